"""What a strategy has to do; one object serves all rounds of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fedfms.contracts.recipe import Recipe


class Strategy:
    """Makes of the sites' differences what is added to the global model.

    A round is `begin`, with every site's count before the first tensor; `add` for each site in the
    order of names, as many times over as `passes` says; `finish`. An object may keep what it needs
    from round to round, and says it in `state_dict`.

    Args:
        recipe: of the job.
    """

    name: ClassVar[str]  # in recipe.json
    passes: ClassVar[int] = 1  # how often all differences of a round are shown

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def begin(self, round_number: int, slices: Mapping[str, int]) -> None:
        """A round begins.

        Args:
            round_number: from 0.
            slices: training slices of each site whose answer counts; see
                `averaging.averaging_weights`.
        """
        raise NotImplementedError

    def add(self, site: str, tensors: Mapping[str, Tensor], pass_number: int) -> None:
        """One site's difference, fp32 on the CPU by name; none of a holdout. Leave it as it is.

        Args:
            site: its name.
            tensors: the same names from every site that has any. They may lie on a disk, where
                each look at one reads it: what is kept of them is a way to read them again until
                the round is over.
            pass_number: from 0, below `passes`.
        """
        raise NotImplementedError

    def finish(self) -> dict[str, Tensor]:
        """What to add to the global model: new fp32 tensors by sorted name, the names of `add`."""
        raise NotImplementedError

    def change(self, mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to add to the global model where the mean of a round is all that is known of it.

        Asked in the place of `begin`, `add` and `finish` where the server sees a secure sum, of the
        strategies that `contracts.recipe.OF_A_MEAN` names.

        Args:
            mean: fp32 by name, each site by its weight.
        """
        return dict(mean)

    def state_dict(self) -> dict[str, Tensor]:
        """What has to be known to go on after this round; nothing for a strategy without memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        if state:
            raise ValueError(f"{self.name} keeps nothing, and got {sorted(state)[0]}")
