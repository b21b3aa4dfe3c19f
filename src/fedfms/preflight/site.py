"""Everything that can be checked at a site before it joins; each container checks what it sees."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedfms import __version__
from fedfms.contracts.machine import Machine
from fedfms.contracts.policy import POLICY_FILE, Policy
from fedfms.contracts.site import SiteConfig
from fedfms.data.memory import CACHE_FOLDER
from fedfms.errors import ConfigError, FedfmsError, TrainerError
from fedfms.exchange.bounds import too_few_patients
from fedfms.kits.about import KitAbout
from fedfms.kits.certificates import RENEW_DAYS
from fedfms.kits.kit import Kit, read_kit
from fedfms.models.methods import installed_methods
from fedfms.preflight import machine, network
from fedfms.preflight.items import Checklist, Item, NotHere, Worry
from fedfms.preflight.kit import (
    check_dates,
    check_files,
    check_issuer,
    check_names,
    check_role,
)
from fedfms.preflight.link import (
    Advice,
    Line,
    advise,
    as_rate,
    as_time,
    round_times,
    told_line,
)
from fedfms.preflight.policy import check_authorization
from fedfms.trainer.connection import ping
from fedfms.user import unreadable

if TYPE_CHECKING:
    from fedfms.data.check import Examination

MAX_CLOCK_SECONDS = 60.0

OnItem = Callable[[Item], None]
AskServer = Callable[[Kit], network.ServerGreeting]  # raises NetworkError, code flare
MeasureLine = Callable[[Kit], Line]  # raises FedfmsError


@dataclass(frozen=True, slots=True, kw_only=True)
class FlarePlaces:
    """Where the flare container has what."""

    kit: Path
    policy: Path
    workspace: Path
    exchange: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerPlaces:
    """Where the trainer container has what."""

    config: Path  # site.yml
    policy: Path
    data: Path | None  # None: site.yml says where
    checkpoints: Path | None
    exchange: Path
    work: Path
    classes: Sequence[str] = field(default=())  # of the job that is to run; () for the site's own


def check_flare_side(
    places: FlarePlaces,
    ask_server: AskServer,
    measure_line: MeasureLine,
    on_item: OnItem | None = None,
) -> list[Item]:
    """The checks of the container that has the network and no images.

    Args:
        places: where what is.
        ask_server: how to ask the server for its greeting, in FLARE's own words.
        measure_line: how to measure the line to it, where it greets.
        on_item: told each item as it is known.
    """
    checks = Checklist(on_item)
    found: dict[str, Kit] = {}

    def kit() -> Kit:
        return found["kit"]

    def whole() -> str:
        found["kit"] = read_kit(places.kit)
        check_files(places.kit)
        check_role(kit(), "client")
        about = kit().about
        return f"{about.participant} of project {about.project}, as the coordinator made it"

    def names() -> str:
        return check_names(kit(), Machine.from_environment().site_name)

    def closed() -> str:
        check_authorization(places.policy, kit().organisation)
        return "no code in jobs, no shell commands from outside"

    checks.check("kit", whole)
    readable = [] if found else ["kit"]  # what of a changed kit can be read is looked at
    checks.check("certificate-dates", lambda: _dates(kit()), readable)
    checks.check("certificate-name", names, readable)
    checks.check("certificate-ca", lambda: check_issuer(kit()), readable)
    greets = _check_server(checks, kit, readable, ask_server)
    checks.check("line", lambda: _line(kit() if greets else None, measure_line))
    checks.check("authorization", closed, readable)
    checks.check("workspace", lambda: machine.check_writable(places.workspace))
    checks.check("workspace-disk", lambda: machine.check_disk(places.workspace), ["workspace"])
    checks.check("exchange", lambda: machine.check_writable(places.exchange))
    checks.check("exchange-size", lambda: machine.check_exchange(places.exchange), ["exchange"])
    checks.check("trainer", lambda: _trainer(places.exchange), ["exchange"])
    return checks.items


def check_trainer_side(places: TrainerPlaces, on_item: OnItem | None = None) -> list[Item]:
    """The checks of the container that has the images and no network."""
    checks = Checklist(on_item)
    found: dict[str, SiteConfig] = {}
    examined: list[Examination] = []

    def site_yml() -> str:
        _require_file(places.config, "SITE_CONFIG in .env", "site.yml")
        found["site"] = SiteConfig.from_yaml(places.config, places.data)
        return f"{places.config} is in order; classes: {', '.join(found['site'].classes)}"

    def data() -> list[Item]:
        from fedfms.data.check import examine  # torch takes seconds to import

        examined.append(examine(found["site"], places.classes or None))
        return _data(examined[0])

    def memory() -> str:
        needed = examined[0].summary.memory.needed if examined else 0
        return machine.check_memory(places.checkpoints, on_gpu, needed)

    def disk() -> str:
        is_ours = bool(examined) and found["site"].cache is None
        cache = places.work / CACHE_FOLDER
        data = examined[0].summary.disk.missing(cache) if is_ours else 0
        return machine.check_disk(places.work, data)

    must_have_gpu = Machine.from_environment().require_gpu

    def gpu() -> str:
        return machine.check_gpu(found.get("site"))

    checks.check("version", lambda: f"fedfms {__version__}")
    checks.check("site-yml", site_yml)
    checks.check("privacy", lambda: _privacy(places.policy))
    checks.check("privacy-account", lambda: _account(places), ["privacy"])

    def data_root() -> Path:
        return places.data or found["site"].data_root

    known = () if places.data else ["site-yml"]
    checks.check("data-folder", lambda: machine.check_data_folder(data_root()), known)
    checks.check("data-read-only", lambda: machine.check_read_only(data_root()), known)
    checks.check("data", data, ["site-yml", "data-folder"])
    checks.check(
        "patients",
        lambda: _patients(found["site"], places.policy),
        ["privacy", "data"],
    )
    checks.check("network", machine.check_no_network)
    checks.check("gpu", gpu, () if must_have_gpu else ["site-yml"])
    checks.check("checkpoints", lambda: machine.check_checkpoints(places.checkpoints))
    on_gpu = must_have_gpu or (bool(found) and found["site"].device.startswith("cuda"))
    checks.check("memory", memory)
    checks.check(
        "shared-memory",
        lambda: machine.check_shared_memory(found["site"].workers or 0),
        ["site-yml"],
    )
    checks.check("work", lambda: machine.check_writable(places.work))
    checks.check("work-disk", disk, ["work"])
    checks.check("exchange", lambda: machine.check_writable(places.exchange))
    checks.check(
        "exchange-size",
        lambda: machine.check_exchange(places.exchange, places.checkpoints),
        ["exchange"],
    )
    return checks.items


# ------------------------------------------------------------------------------------- the server


def _check_server(
    checks: Checklist, kit: Callable[[], Kit], readable: Sequence[str], ask_server: AskServer
) -> bool:
    """Whether the server greets at all, beside the items."""
    greeted: list[network.ServerGreeting] = []

    def name() -> str:
        host = kit().about.server_host
        if network.proxy_applies(host):
            return f"the proxy looks up {host}"
        return f"{host} is {', '.join(network.resolve(host, kit().about.server_port))}"

    def tcp() -> str:
        network.connect_to_server(kit()).close()
        return f"{kit().about.server_host}:{kit().about.server_port} answers"

    def tls() -> str:
        if not os.access(kit().key_file, os.R_OK):  # which fails the kit's own line
            raise NotHere(f"not looked at: {kit().key_file} cannot be read")
        network.shake_hands(network.connect_to_server(kit()), kit()).close()
        return "the server's certificate is of this kit's CA, and the server accepts this kit's"

    def flare() -> str:
        greeted.append(ask_server(kit()))
        return "FLARE's server answers"

    certificate = ["certificate-dates", "certificate-ca"]
    checks.check("server-name", name, readable)
    checks.check("proxy", lambda: _proxy(kit().about), readable)
    checks.check("server-tcp", tcp, readable or ["server-name", "proxy"])
    checks.check("server-tls", tls, readable or [*certificate, "server-tcp"])
    checks.check("server-flare", flare, readable or ["certificate-name", "server-tls"])
    greeting = readable or ["server-flare"]
    checks.check("clock", lambda: _clock(greeted[0].clock_ahead), greeting)
    checks.check("version", lambda: _version(greeted[0].version), greeting)
    checks.check("revoked", lambda: _revoked(greeted[0].revoked, kit()), greeting)
    return bool(greeted)


def _line(kit: Kit | None, measure_line: MeasureLine) -> str:
    """How long a round's transfers take.

    Args:
        kit: None where no server is there that could measure.
    """
    told = Machine.from_environment().link_megabytes_per_second
    by = "LINK_MB_PER_SECOND in .env" if told else "what is assumed of a line"
    why = "the server is not there"
    if kit is not None:
        try:
            line = measure_line(kit)
        except FedfmsError as error:
            why = error.problem
        else:
            return _measured(line, told)
    return f"{_round_times(told_line(told))}, by {by}; not measured: {why}"


def _measured(line: Line, told: float | None) -> str:
    trip = f", {1e3 * (line.round_trip or 0.0):.0f} ms there and back"
    text = f"{as_rate(line.down)} down, {as_rate(line.up)} up{trip}; {_round_times(line)}"
    advice = advise(line, told)
    if advice == Advice(None, None):
        return text
    fixes = []
    if advice.site is not None:
        fixes.append(f"write LINK_MB_PER_SECOND={advice.site} into .env")
    if advice.server is not None:
        fixes.append(
            f"ask the coordinator to write LINK_MB_PER_SECOND={advice.server} into the server's "
            ".env, or less if another site needs less"
        )
    raise Worry(f"slower than the kit is prepared for: {text}", "; ".join(fixes))


def _round_times(line: Line) -> str:
    """The transfers of a round of FedMSA and of FedSAM as they come, in half precision."""
    found = {(one.method, one.precision): one for one in round_times(line)}
    parts = []
    for method, precision in (("fedmsa", "fp16"), ("fedsam", "fp16")):
        one = found[method, precision]
        parts.append(f"{as_time(one.seconds)} for {method} ({precision}, {one.megabytes:.0f} MB)")
    return f"a round's transfers on ViT-B take {' and '.join(parts)}"


def _proxy(about: KitAbout) -> str:
    host, port = about.server_host, about.server_port
    proxy = network.proxy_for(host)
    if proxy is None:
        return f"no proxy stands between here and {host}"
    try:
        network.connect_through(proxy, host, port).close()
    except network.NetworkError as error:
        if error.code != "tcp":  # that the server does not answer the proxy is the next item's
            raise
    return f"through {proxy} ({proxy.variable})"


def _clock(ahead: float | None) -> str:
    if ahead is None:
        raise Worry(*_no_greeting("clock"))
    if abs(ahead) <= MAX_CLOCK_SECONDS:
        return f"the server's clock and this one differ by {abs(ahead):.0f} s"
    raise network.NetworkError(
        f"this machine's clock is {abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead of'} the "
        f"server's; at most {MAX_CLOCK_SECONDS:.0f} s are allowed",
        "let this machine set its clock by the network (chrony or systemd-timesyncd)",
        code="clock",
    )


def _version(there: str | None) -> str:
    if there is None:
        raise Worry(*_no_greeting("version"))
    if there == __version__:
        return f"fedfms {__version__} here and at the server"
    raise ConfigError(
        f"this image has fedfms {__version__}, the server has {there}; it refuses what another "
        "version sends",
        f"set FEDFMS_IMAGE in .env to the image of version {there}",
        code="other-version",
    )


def _revoked(revoked: bool | None, kit: Kit) -> str:
    if revoked is None:
        raise Worry(*_no_greeting("list of disabled sites"))
    if not revoked:
        return f"the server knows nothing against {kit.about.participant}"
    raise ConfigError(
        f"the coordinator has disabled {kit.about.participant}; the server refuses it",
        "ask the coordinator",
        code="revoked",
    )


def _no_greeting(what: str) -> tuple[str, str]:
    return f"the server does not tell its {what}", "ask the coordinator which version it runs"


# ---------------------------------------------------------------------------------- kit and policy


def _dates(kit: Kit) -> str:
    check_dates(kit)
    left = kit.days_left
    ends = min(kit.certificate.not_valid_after_utc, kit.root.not_valid_after_utc)
    if left < RENEW_DAYS:
        raise Worry(
            f"the certificate ends in {left} days, on {ends:%Y-%m-%d}",
            "ask the coordinator to renew this kit",
        )
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"valid until {ends:%Y-%m-%d}; today is {now:%Y-%m-%d}"


def _trainer(exchange: Path) -> str:
    try:
        pong = ping(exchange)
    except TrainerError as error:
        raise Worry("the trainer does not run yet, or does not answer", error.fix) from None
    if pong.version != __version__:
        raise ConfigError(
            f"the trainer has fedfms {pong.version}, this container has {__version__}",
            "use one FEDFMS_IMAGE for both",
            code="other-version",
        )
    return f"the trainer of {pong.site} answers"


# ---------------------------------------------------------------------------------------- trainer


def _require_file(path: Path, where: str, name: str) -> None:
    try:
        path.open("rb").close()
    except PermissionError as error:
        raise unreadable(path, error, "unreadable-file") from None
    except OSError:
        raise ConfigError(
            f"there is no {path}",
            f"put the kit's {name} back where {where} says, and fill it in",
            code="missing-file",
        ) from None


def _privacy(folder: Path) -> str:
    _require_file(folder / "privacy.json", "SITE_POLICY in .env", "policy/privacy.json")
    policy = Policy.from_folder(folder)
    known = installed_methods()
    if unknown := [name for name in policy.methods if name not in known]:
        raise Worry(
            f"{POLICY_FILE} allows {', '.join(unknown)}, and installed here are {', '.join(known)}",
            "correct the name, or install the package that brings it in this site's image",
        )
    noise = f", noise {policy.noise_std}" if policy.noise_std else ""
    clip = f"clipped at {policy.clip_norm}" if policy.clip_norm else "not clipped"
    return (
        f"{', '.join(policy.methods)}; at most {policy.max_rounds} rounds; changes {clip}{noise}; "
        f"scores of at least {policy.min_cases} cases; training on at least "
        f"{policy.min_training_patients} patients"
    )


def _patients(site: SiteConfig, policy: Path) -> str:
    """Whether there are enough to train on by the site's own policy."""
    from fedfms.data.manifest import find_whole_cases, training_patients

    rules, patients = Policy.from_folder(policy), training_patients(find_whole_cases(site)[0])
    if breach := too_few_patients(rules, patients):
        raise Worry(
            f"nothing is trained here: {breach.problem}",
            f"{breach.fix}; each difference is then of these few alone. A site that only scores "
            "(holdout) needs none",
        )
    if rules.limits_epsilon and rules.delta * patients >= 1:
        raise Worry(
            f"delta is {rules.delta:g}: of {patients} patients, one could be shown whole",
            "set delta in privacy.json to less than one over the number of patients",
        )
    return f"{patients} to train on; the policy asks for {rules.min_training_patients} at least"


def _account(places: TrainerPlaces) -> str:
    """What training has cost so far, for patients and for the site."""
    from fedfms.trainer.budget import Budget

    spent = Budget(places.work).spent(Policy.from_folder(places.policy))
    if over := [one for one in spent if one.budget is not None and one.epsilon >= one.budget]:
        raise Worry(
            f"nothing is left to spend: {'; '.join(map(str, over))}",
            "this site trains no more until its people raise the limit in privacy.json",
        )
    told = [one for one in spent if one.is_told]
    if not told:
        return (
            "no limit of differential privacy is set (patient_epsilon, site_epsilon), and nothing "
            "left with noise"
        )
    return "; ".join(map(str, told))


def _data(examination: Examination) -> list[Item]:
    """A line with the numbers of what was read, then one for each finding."""
    return [
        Item(
            "data" if not examination.findings else "data-read", "PASS", examination.summary.line()
        ),
        *(
            Item(
                "data",
                "FAIL" if finding.severity == "error" else "WARN",
                finding.problem,
                finding.fix,
                finding.code,
            )
            for finding in examination.findings
        ),
    ]
