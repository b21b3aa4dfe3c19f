"""What training would take of this container's memory, job by job, before one is submitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Compute
from fedfms.preflight.items import Checklist, Item, Worry


def check_plans(
    recipes: Sequence[tuple[str, Recipe]],
    site: Compute,
    on_item: Callable[[Item], None] | None = None,
) -> list[Item]:
    """A line for each recipe: how its steps would be computed here, and at which peak of memory.

    WARN where not even the smallest way fits: a trainer would try it, or refuse where it cannot fit
    whatever else ends.

    Args:
        recipes: each with the name by which a person knows it.
        site: device, micro-batch and loader processes.
        on_item: told each item as it is known.
    """
    checks = Checklist(on_item)
    for name, recipe in recipes:
        checks.check("plan", lambda name=name, recipe=recipe: _plan(name, recipe, site))  # type: ignore[misc]
    return checks.items


def _plan(name: str, recipe: Recipe, site: Compute) -> str:
    from fedfms.training.device import ready_device
    from fedfms.training.plan import plan_memory, what_would_fit

    device = ready_device(site)
    plan = plan_memory(recipe, site, device)
    what = (
        f"{name} ({recipe.method}, {recipe.backbone}, {recipe.image_size} pixels, batch "
        f"{recipe.batch_size}, {recipe.precision}, {device.type}): {plan}"
    )
    if plan.fits:
        return what
    raise Worry(f"does not fit: {what}", what_would_fit(recipe, site, device, plan))
