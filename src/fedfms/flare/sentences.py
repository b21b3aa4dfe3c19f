"""What a person who watches a run reads of a failure: what happened, and what to do.

A site sends a code and never its own words (errors.py). Here the code becomes the end of a sentence
about the site, for somebody at another machine; the code stays in it, to look for.
"""

from __future__ import annotations

import re

from fedfms import errors
from fedfms.contracts.codes import CODES

LATE = "the answer came after the round had ended"
GONE = "the site is gone"
PAUSED = "the site paused itself"
SILENT = "no answer from the site in time"

_CODED = re.compile(r"\b([A-Z]\w+) \(([a-z0-9-]+)[,)]")
_LOOK = "ask the site to read errors.log in its work folder, which says it in full"
_RUNS = (
    "ask the site whether its containers run (docker compose ps), and start them (docker compose "
    "up --detach)"
)

_OF_ITSELF = {  # reasons that are no code
    LATE: (
        "its answer came after the round had ended",
        "nothing, where it was once; a site that is always late needs a smaller micro_batch "
        "or fewer local_epochs",
    ),
    GONE: ("the server does not hear from it", _RUNS),
    PAUSED: ("its own people paused it", "nothing: it takes part again when they are ready"),
    SILENT: ("no answer came from it in time", _RUNS),
    "TASK_ABORTED": ("its task was stopped on request", "nothing"),
    "EXECUTION_EXCEPTION": (
        "its FLARE client's job process met an error that nobody foresaw",
        "ask the site to read its FLARE client's log: docker compose logs {site}-flare",
    ),
}
_BY_CLASS = {  # what to do about an error whose code says no more
    "TrainerError": (
        "ask the site to read the end of its trainer's log (docker "
        "compose logs {site}-trainer); it is "
        "asked again in the next round"
    ),
    "SiteDataError": "ask the site to run fedfms check-data, which names the file",
    "CheckpointError": (
        "ask the site to run fedfms check-site --job with this job, which names the checkpoint"
    ),
    "ConfigError": "ask the site to run fedfms check-site",
    "TrainingError": _LOOK,
    "DoorClosed": "ask the site whether its policy (privacy.json) means this",
    "TaskAborted": "nothing; submit the job again if you like",
    "ContributionRefused": "run the same version of fedfms at the server and every site",
}
_BY_CODE = {
    "no-trainer": "ask the site to start its trainer: docker compose up --detach {site}-trainer",
    "trainer-stopped": (
        "ask the site to start its trainer: docker compose up --detach {site}-trainer"
    ),
    "trainer-died": (
        "ask the site to read the end of its trainer's log; killed for memory: a smaller "
        "micro_batch in site.yml, or more memory for the container"
    ),
    "trainer-stalled": (
        "ask the site what its trainer's log says it waited for; on a slow machine, a larger "
        "stall_seconds in site.yml"
    ),
    "trainer-hung": (
        "ask the site to start its trainer again: docker compose restart {site}-trainer"
    ),
    "too-slow": "nothing, where it was once; else ask the site what else its machine does",
    "out-of-memory": (
        "ask the site for a smaller micro_batch in site.yml, or submit with a smaller image_size"
    ),
    "exchange-full": "ask the site to give the exchange volume three times the model's size",
    "other-protocol": "ask the site to start the same image in both containers",
    "nonsense": "ask the site to start the same image in both containers",
    "gpu-failed": (
        "nothing at first: its trainer has started again; if it comes back, ask the site for "
        "nvidia-smi and the kernel's log (dmesg, Xid)"
    ),
    "gpu-busy": "ask the site what else uses its GPU (nvidia-smi)",
    "no-gpu": (
        "ask the site for nvidia-smi, and to start its trainer again; or submit without --gpu"
    ),
    "non-finite-loss": (
        "submit with a smaller learning_rate, or look at the site's images (fedfms check-data)"
    ),
    "non-finite": (
        "submit with a smaller learning_rate, or look at the site's images (fedfms check-data)"
    ),
    "non-finite-logits": "submit with a smaller learning_rate, or with precision=fp32",
    "too-large": (
        "look at the site's images (fedfms check-data), or allow more by the recipe's limit"
    ),
    "other-version": "ask the site to take the image of the server's version",
    "other-recipe": (
        "nothing, where the site had just come back; else run the same version everywhere"
    ),
    "unexpected": "ask the site for errors.log in its work folder, and tell those who make fedfms",
    "no-exchange": "ask the site to set FEDFMS_EXCHANGE for its FLARE client",
}


def failure(reason: str | None, site: str) -> str:
    """Why a site's answer is not there, after `SITE failed in round N: `.

    Args:
        site: its name, for the commands that it is to type.
        reason: as recorded: a public error such as `TrainerError (trainer-died); …`, a code of the
            server's guard such as `non-finite`, one of FLARE's return codes, or free text.
    """
    if not reason:
        return "no reason was given; fix: read the server's log"
    if (known := _OF_ITSELF.get(reason)) is not None:
        return f"{known[0]}; fix: {known[1].format(site=site)}"
    coded = _CODED.search(reason)
    if coded is None:
        return reason if "; fix: " in reason else f"{reason}; fix: {_LOOK}"
    kind, code = coded[1], coded[2]
    error = getattr(errors, kind, None)
    means = CODES.get(code, reason)
    if code not in CODES and isinstance(error, type) and issubclass(error, errors.FedfmsError):
        means = CODES[error.default_code]
    who = "the server refused what it sent: " if kind == "ContributionRefused" else ""
    do = _BY_CODE.get(code) or _BY_CLASS.get(kind, _LOOK)
    return f"{who}{means} ({code}); fix: {do.format(site=site)}"


_SERVER_LOG = "read the server's log (docker compose logs server)"
_ENDS: tuple[tuple[str, str, str], ...] = (  # FLARE's own words, what they mean, what to do
    (
        r"deployment policy violation",
        "fewer sites were left than the job needs (min_clients)",
        "start the sites that are gone and submit it again, or with a smaller min_clients",
    ),
    (
        r"fatal return code (?P<code>\w+) from client (?P<site>\S+)",
        "{site}'s FLARE client answered {code}, for which FLARE ends a job",
        "ask {site} to read its FLARE client's log (docker compose logs {site}-flare)",
    ),
    (
        r"FINISHED:ABANDONED",
        "FLARE says FINISHED:ABANDONED, since its server was started again and could not go on",
        "submit it again",
    ),
    (
        r"FINISHED:(?P<code>EXECUTION_EXCEPTION|ABNORMAL)",
        "FLARE says FINISHED:{code}: its process at the server ended without having said why",
        _SERVER_LOG,
    ),
    (
        r"FINISHED:CANT_SCHEDULE",
        "FLARE says FINISHED:CANT_SCHEDULE, since it could not start it at enough sites",
        "look at fedfms status, and submit it again when the sites are ready",
    ),
)


def end(reason: str) -> tuple[str, str]:
    """Why a job ended before its end, and what to do.

    Args:
        reason: as recorded: `problem; fix: fix`, or FLARE's own words.
    """
    problem, found, fix = reason.partition("; fix: ")
    if found:
        return problem, fix
    for pattern, means, do in _ENDS:
        if (match := re.search(pattern, reason)) is not None:
            return means.format(**match.groupdict()), do.format(**match.groupdict())
    return reason, _SERVER_LOG
