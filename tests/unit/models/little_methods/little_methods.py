"""A method with a network of its own, a part that stays at the site, and a step of its own."""

from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from fedfms.contracts.recipe import Recipe
from fedfms.models.methods import Gradients, Method, Step
from fedfms.models.segmenter import Segmenter

PULL = 0.5  # of FedProx (Li et al. 2020, arXiv 1812.06127), back to what was received


class TinyNetwork(Segmenter):
    def __init__(self, recipe: Recipe, method: Method) -> None:
        super().__init__(recipe, method)
        self.features = nn.Conv2d(3, 4, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, len(recipe.classes), kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images)).relu())


class Tiny(Method):
    name: ClassVar[str] = "tiny"
    title: ClassVar[str] = "Tiny"
    sentence: ClassVar[str] = "two layers train and travel; the normalization stays at the site"
    uses_sam: ClassVar[bool] = False

    def network(self, recipe: Recipe) -> Segmenter:
        return TinyNetwork(recipe, self)

    def learns(self, tensor: str, recipe: Recipe) -> bool:
        return True

    def stays(self, tensor: str, recipe: Recipe) -> bool:
        return tensor.startswith("norm.")

    def start_round(self, model: nn.Module, recipe: Recipe) -> Step:
        received = [parameter.detach().clone() for parameter in model.parameters()]

        def step(optimizer: Optimizer, gradients: Gradients) -> float:
            loss = gradients()
            for parameter, before in zip(model.parameters(), received, strict=True):
                parameter.grad += PULL * (parameter.detach() - before)
            optimizer.step()
            return loss

        return step
