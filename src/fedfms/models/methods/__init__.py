"""One file a method: what is added to the backbone, what learns, what travels, and its words.

A method of another distribution joins by an entry point:

    [project.entry-points."fedfms.methods"]
    decoder = "decoder_only:DecoderOnly"   # a subclass of Method whose name is "decoder"

It is installed where the network is built: at the server and in every trainer. Kits, FLARE's class
list and the FLARE clients know no method; a job names `fedfms.flare.executor.TrainingExecutor`. A
hospital agrees by a line in its own policy/privacy.json.
"""

from __future__ import annotations

from fedfms.models.methods.fedmsa import FedMSA
from fedfms.models.methods.fedsam import FedSAM
from fedfms.models.methods.lora import LoRA
from fedfms.models.methods.method import Gradients, Method, Step, learns_in_decoder, plain_step
from fedfms.plugins import find_part, installed

GROUP = "fedfms.methods"  # of entry points
_OWN: dict[str, type[Method]] = {method.name: method for method in (FedSAM, FedMSA, LoRA)}

__all__ = [
    "GROUP",
    "Gradients",
    "Method",
    "Step",
    "find_method",
    "installed_methods",
    "learns_in_decoder",
    "plain_step",
]


def installed_methods() -> tuple[str, ...]:
    """Names of the methods there are here, sorted."""
    return installed(GROUP, _OWN)


def find_method(name: str) -> Method:
    """The method of a recipe.

    Raises:
        ConfigError: unknown-part, ambiguous-part or broken-part; see `plugins.find_part`.
    """
    return find_part(Method, GROUP, _OWN, "method", name)()
