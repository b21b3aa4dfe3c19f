"""FLARE's hook around the guard: every answer of a site passes here before the server uses it.

A refused contribution becomes an error reply with the reason, which ScatterAndGather tolerates as
long as enough sites remain; what passes is rewritten from what was checked, so that the aggregator
and the model selector see nothing else.
"""

from __future__ import annotations

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import ReturnCode, ServerCommandKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from fedfms import __version__
from fedfms.contracts.contribution import MAX_PICTURE_BYTES, MAX_PICTURES, Contribution
from fedfms.contracts.recipe import Recipe
from fedfms.errors import ContributionRefused, FedfmsError
from fedfms.exchange.guard import check_contribution, check_metrics
from fedfms.exchange.pictures import is_plain_png
from fedfms.exchange.tensors import shapes_of
from fedfms.flare.internals.uploads import TOO_LARGE, UNDECODABLE, Uploads, bound_uploads
from fedfms.flare.job import (
    CONTRIBUTION,
    PICTURES,
    REASON,
    SERVER_MODELS,
    TRAIN_TASK,
    read_recipe,
    training_dxo,
)
from fedfms.flare.persistor import persistor_of
from fedfms.flare.receipts import ReceiptCheck

# bytes of an answer beside the values of the model: pictures, names, a report
BESIDE_THE_MODEL = MAX_PICTURES * MAX_PICTURE_BYTES + 16 * 2**20

UNREAD = {
    TOO_LARGE: "is larger than an answer of this job can be",
    UNDECODABLE: "cannot be decoded",
}

# events after which sites are asked, when the model is there
_ASKS = (AppEventType.ROUND_STARTED, AppEventType.CROSS_VAL_INIT)

_USABLE, _NOBODY = "usable contributions of training sites", "none"


class ResultGuard(Filter):  # type: ignore[misc]
    """Refuses what cannot be used, and ends the job when too few contributions remain in a round.

    Args:
        min_contributions: accepted contributions of training sites that a round needs. FLARE's own
            `min_clients` counts answers, those of sites that only evaluate included.
        persistor_id: of the SafeTensorsPersistor, which knows the travelling tensors.
    """

    def __init__(self, min_contributions: int = 1, persistor_id: str = "persistor") -> None:
        super().__init__()
        self.min_contributions = min_contributions
        self.persistor_id = persistor_id
        self._accepted: set[str] = set()
        self._refused: dict[str, str] = {}
        self._receipts = ReceiptCheck()
        self._is_bounded = False  # what sites send

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Count what the aggregator took in this round."""
        if event_type in _ASKS and not self._is_bounded:
            self._bound_uploads(fl_ctx)
        if event_type == AppEventType.ROUND_STARTED:
            self._accepted, self._refused = set(), {}
        elif event_type == AppEventType.AFTER_CONTRIBUTION_ACCEPT:
            answer = fl_ctx.get_prop(AppConstants.TRAINING_RESULT)
            said = from_shareable(answer).get_meta_prop(CONTRIBUTION, {})
            if fl_ctx.get_prop(AppConstants.AGGREGATION_ACCEPTED) and said["role"] == "train":
                self._accepted.add(said["site"])
        elif event_type == AppEventType.BEFORE_AGGREGATION:
            self._check_round(fl_ctx)

    def _bound_uploads(self, fl_ctx: FLContext) -> None:
        """Have this process take no more of a site than an answer of this job can have."""
        try:
            model = persistor_of(fl_ctx, self.persistor_id).start_model(fl_ctx)
        except FedfmsError:  # the persistor says it, and ends the job
            return
        bytes_each = 8 if read_recipe(fl_ctx).sums_only else 4
        largest = bytes_each * sum(one.numel() for one in model.values()) + BESIDE_THE_MODEL
        job = str(fl_ctx.get_job_id())
        self._is_bounded = True
        bound_uploads(Uploads(fl_ctx.get_engine(), job, largest, _refused_unread))

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The checked answer, or an error reply with the reason."""
        if shareable.get_return_code() not in (None, ReturnCode.OK):
            return shareable
        site = sender_of(shareable)
        try:
            recipe = read_recipe(fl_ctx)
            task_name = shareable.get_header(ReservedHeaderKey.TASK_NAME)
            if task_name == TRAIN_TASK:
                return self._checked_contribution(site, recipe, shareable, fl_ctx)
            return self._checked_evaluation(site, recipe, shareable, fl_ctx)
        except FedfmsError as error:
            problem, code = error.problem, error.code
        except Exception as error:  # whatever a site may send: nothing of it reaches the average
            problem, code = f"it cannot be read ({type(error).__name__})", "malformed-report"
        self._refused[site] = code
        self.log_error(fl_ctx, f"refused what {site} sent ({code}): {problem}", fire_event=False)
        reason = f"ContributionRefused ({code}): {problem}"
        refusal = make_reply(ReturnCode.EXECUTION_RESULT_ERROR, {REASON: reason})
        refusal.set_cookie_jar(shareable.get_cookie_jar() or {})
        return refusal

    def _checked_contribution(
        self, site: str, recipe: Recipe, shareable: Shareable, fl_ctx: FLContext
    ) -> Shareable:
        dxo = from_shareable(shareable)
        contribution = Contribution.from_dict(dxo.get_meta_prop(CONTRIBUTION))
        _check_sender(site, contribution)
        number = shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND)
        if dxo.data_kind != DataKind.WEIGHT_DIFF or contribution.round != number:
            raise _refused(f"{site} answered another round or with no difference", "other-task")
        shapes = shapes_of(persistor_of(fl_ctx, self.persistor_id).start_model(fl_ctx))
        tensors = check_contribution(shapes, recipe, __version__, dxo.data, contribution)
        self._receipts.check(site, shareable, contribution, dxo.data, (), fl_ctx)
        # in place: FLARE's model selector reads the object that came, not what a filter returns
        return training_dxo(tensors, contribution).update_shareable(shareable)

    def _checked_evaluation(
        self, site: str, recipe: Recipe, shareable: Shareable, fl_ctx: FLContext
    ) -> Shareable:
        contribution, pictures = _check_evaluation(site, recipe, shareable)
        self._receipts.check(site, shareable, contribution, {}, pictures, fl_ctx)
        data = {CONTRIBUTION: contribution.to_dict(), PICTURES: pictures}
        return DXO(DataKind.METRICS, data=data).update_shareable(shareable)

    def _check_round(self, fl_ctx: FLContext) -> None:
        if len(self._accepted) >= self.min_contributions:
            return
        number = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        refused = ", ".join(f"{site} ({code})" for site, code in sorted(self._refused.items()))
        self.system_panic(
            f"round {number} has {len(self._accepted)} {_USABLE}, "
            f"it needs {self.min_contributions}; refused: {refused or _NOBODY}; "
            "fix: look at these sites, or run the job with --set min_clients=N",
            fl_ctx,
        )


def is_for_too_few_usable(reason: str) -> bool:
    """Whether a job ends because sites did not answer a round, or with an error; none was refused.

    What was refused would be refused again.
    """
    return _USABLE in reason and f"refused: {_NOBODY};" in reason


def _refused_unread(code: str) -> dict[str, str]:
    """Headers of the reply that stands for an answer that was not read."""
    return {REASON: f"ContributionRefused ({code}): the answer {UNREAD[code]}"}


def sender_of(shareable: Shareable) -> str:
    """The site whose certificate the answer came with; what it says about itself is not asked."""
    return str(shareable.get_header(ServerCommandKey.FL_CLIENT).name)


def _check_evaluation(
    site: str, recipe: Recipe, shareable: Shareable
) -> tuple[Contribution, list[bytes]]:
    """What a site said of a finished model, and its pictures."""
    dxo = from_shareable(shareable)
    contribution = Contribution.from_dict(dxo.data.get(CONTRIBUTION))
    _check_sender(site, contribution)
    model = SERVER_MODELS.get(shareable.get_cookie(AppConstants.MODEL_OWNER))
    if (contribution.kind, contribution.model) != ("evaluate", model):
        raise _refused(f"{site} evaluated another model", "other-task")
    if contribution.recipe_sha256 != recipe.sha256:
        raise _refused(f"{site} worked with another recipe", "other-recipe")
    if contribution.package_version != __version__:
        raise _refused(f"{site} runs fedfms {contribution.package_version}", "other-version")
    check_metrics(contribution)
    pictures = dxo.data.get(PICTURES)
    if not isinstance(pictures, list) or len(pictures) > MAX_PICTURES:
        raise _refused(f"{site} sent pictures that cannot be used", "malformed-report")
    for picture in pictures:
        if not (isinstance(picture, bytes) and len(picture) <= MAX_PICTURE_BYTES):
            raise _refused(f"{site} sent a picture that is too large", "malformed-report")
        if not is_plain_png(picture):
            raise _refused(f"{site} sent a picture that is no PNG", "malformed-report")
    return contribution, pictures


def _check_sender(site: str, contribution: Contribution) -> None:
    if contribution.site != site:
        raise _refused(f"{site} sent a report in the name of {contribution.site}", "other-site")


def _refused(problem: str, code: str) -> ContributionRefused:
    return ContributionRefused(
        problem, "run the same version of fedfms at the server and every site", code=code
    )
