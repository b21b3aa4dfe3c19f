"""What a method says of itself. Without torch: reports and policies ask for the words alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from fedfms.contracts.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from fedfms.models.segmenter import Segmenter

# Puts the gradient of the batch's mean loss into the parameters, anew at each call and clipped as
# the recipe says; the loss.
Gradients = Callable[[], float]
# One optimizer step on one batch; the loss before it. Where memory runs out inside `Gradients` it
# is called once more with fewer slices at once: whoever moved parameters moves them back.
Step = Callable[["Optimizer", Gradients], float]


class Method:
    """One way of fine-tuning together; a subclass says where it is another.

    It holds no state: what learns lies in the network, and what a round needs in `start_round`.
    """

    name: ClassVar[str]  # in recipe.json and privacy.json
    title: ClassVar[str]  # for people, such as FedMSA
    sentence: ClassVar[str]  # for a report: what trains and what travels
    adds: ClassVar[str] = ""  # to SAM, in words, such as "adapters in the image encoder"
    places_adapters: ClassVar[bool] = False  # where the recipe's adapter_blocks says
    uses_sam: ClassVar[bool] = True  # False: `network` gives another, and backbone is "none"
    exports: ClassVar[tuple[str, ...]] = ("fedfms", "onnx", "bundle")  # formats of fedfms export

    def network(self, recipe: Recipe) -> Segmenter:
        """A network that is not SAM, drawn from torch's global generator; the caller seeds it."""
        raise NotImplementedError(f"{self.name} has no network of its own")

    def add(self, encoder: nn.Module, recipe: Recipe) -> None:
        """Add to SAM's image encoder, in place, once its checkpoint is loaded.

        Args:
            encoder: `models.encoder.ImageEncoder`.
            recipe: the job's. New layers are drawn from torch's global generator, which the caller
                has seeded.
        """

    def learns(self, tensor: str, recipe: Recipe) -> bool:
        """Whether a parameter learns, by its name in the network; the others are frozen."""
        raise NotImplementedError

    def stays(self, tensor: str, recipe: Recipe) -> bool:
        """Whether a parameter that learns never leaves the site; it is kept there between rounds.

        At a site that never trained, and at the server, such a parameter is as it was drawn.
        Buffers, such as the running statistics of a normalization, never travel either; with a
        trainer that had to start again they begin anew.
        """
        return False

    def is_added(self, tensor: str, recipe: Recipe) -> bool:
        """Whether a parameter is what `add` added: it stays at its site with `personal: adapters`.

        At the server, and at a site that never trained, it is as it was drawn.
        """
        return False

    def merge(self, model: Segmenter) -> None:
        """Let SAM's own tensors compute all that was added to them, in place, and take it away.

        Asked before a model is exported as "sam", of a method whose `exports` name that.
        """

    def start_round(self, model: nn.Module, recipe: Recipe) -> Step:
        """How each step of a local round is made; called once a round, at its start.

        Args:
            model: as it was received.
            recipe: the job's.
        """
        return plain_step


def plain_step(optimizer: Optimizer, gradients: Gradients) -> float:
    """The gradient, and a step along it."""
    loss = gradients()
    optimizer.step()
    return loss


def learns_in_decoder(tensor: str, recipe: Recipe) -> bool:
    """Whether a tensor of SAM's mask decoder gets a gradient, or one of what stands around SAM.

    That is the head of several classes, and the mixture of several contrasts.

    The decoder's `k_proj.bias` are among them, though softmax cancels what they add: their gradient
    is rounding noise (1e-12), and Adam moves them by some 1e-7 a step. They are SAM's, and leaving
    them out would save 0.01 % of the bytes.
    """
    part, _, rest = tensor.partition(".")
    if part in ("class_head", "contrast_mix"):
        return True
    if part != "mask_decoder" or rest.startswith("iou_prediction_head."):
        return False  # no loss asks for mask quality
    if rest.startswith("output_hypernetworks_mlps."):
        return len(recipe.classes) > 1 or rest.startswith("output_hypernetworks_mlps.0.")
    return True
