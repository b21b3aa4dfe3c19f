"""`./check-site` in a kit's own containers: whatever a hospital breaks, that line alone fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from certificates import with_own_certificate
from containers import REPOSITORY, Project, docker, wait_until
from hospitals import HOST, USER, Hospitals, fedfms

from fedfms.local.synthetic import STYLES, write_phantom_site

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(600)]

SITE, OTHER = "clinic", "other-clinic"
PROXY_PORT = 3128
LITTLE_PROXY = REPOSITORY / "tests/unit/preflight/little_proxy.py"


@dataclass
class Clinic:
    """A site with its kit, and the federation that it belongs to."""

    hospitals: Hospitals
    scratch: Path

    @property
    def project(self) -> Project:
        """The site's own compose project."""
        return self.hospitals.projects[SITE]

    def copy(self, name: str) -> Path:
        """A copy, to be broken, of kit, policy, site.yml or images; a new one for each test."""
        source = (
            self.hospitals.folder / "images" if name == "images" else self.project.folder / name
        )
        target = self.scratch / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)
        return target

    def sign(self, kit: Path, **changes: Any) -> None:
        """Sign a broken kit with the project's CA, so that nothing but the change is wrong."""
        if changes:
            about = json.loads((kit / "fedfms.json").read_text())
            (kit / "fedfms.json").write_text(json.dumps({**about, **changes}))
        with_own_certificate(self.hospitals.output / self.hospitals.name, kit)

    def check(
        self,
        part: str,
        *options: str,
        environment: Mapping[str, str] | None = None,
        override: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> tuple[int, list[dict[str, str]]]:
        """Run one container of the site as ./check-site does; its exit code and its lines.

        Args:
            part: trainer or flare.
            options: of `docker compose run`.
            environment: what .env would say otherwise; it goes before the file.
            override: what somebody changed in the service in compose.yml.
            name: another compose project, which has volumes of its own.
        """
        self.own(self.scratch)
        files: tuple[str, ...] = ()
        if override is not None:
            path = self.scratch / "override.json"  # JSON is YAML
            path.write_text(json.dumps({"services": {f"{SITE}-{part}": override}}))
            files = ("compose.yml", str(path))
        project = Project(self.project.folder, name or self.project.name, files=files)
        command = project.command("run", "--rm", "--no-deps", "-T", *options, f"{SITE}-{part}")
        try:
            done = subprocess.run(
                [*command, "check-site", "--json"],
                cwd=project.folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
            )
        finally:
            if name is not None:
                project.down()
        assert done.stdout.startswith("["), done.stdout + done.stderr
        return done.returncode, json.loads(done.stdout)

    @staticmethod
    def own(folder: Path) -> None:
        """The tests run as root; the site's files belong to the containers' user."""
        subprocess.run(["chown", "-R", f"{USER}:{USER}", folder], check=True)


@pytest.fixture(scope="module")
def federation(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """A server, and one site with phantoms in its own kit; both run."""
    folder = tmp_path_factory.mktemp("federation")
    hospitals = Hospitals(folder, image, [SITE, OTHER], name="fedfms-check")
    try:
        hospitals.provision()
        hospitals.install(HOST, SERVER_PUBLISH=hospitals.port).run("up", "-d")
        images = folder / "images"
        write_phantom_site(images, next(iter(STYLES)), cases=18, slices=1)
        clinic = hospitals.install(SITE, SITE_DATA=images)
        shutil.copy(images / "site.yml", clinic.folder / "site.yml")
        shutil.rmtree(images / "policy")
        (images / "site.yml").unlink()
        hospitals.unzip(OTHER)
        clinic.run("up", "-d")
        wait_until(lambda: healthy(clinic), 90, "both containers of the site are healthy")
        yield hospitals
    finally:
        hospitals.down()


def healthy(project: Project) -> bool:
    states = [container["State"] for container in project.containers().values()]
    return len(states) == 2 and all(state["Health"]["Status"] == "healthy" for state in states)


@pytest.fixture
def clinic(federation: Hospitals, tmp_path: Path) -> Clinic:
    for path in [tmp_path, *tmp_path.parents][:3]:
        path.chmod(0o755)
    return Clinic(federation, tmp_path)


@pytest.fixture(scope="module")
def foreign(federation: Hospitals, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same site's kit in another project, with another CA."""
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copy(federation.project_file, folder / "project.yml")
    fedfms("provision", folder / "project.yml", "--output", folder / "output")
    archive = folder / "output" / "kits" / f"{SITE}.zip"
    subprocess.run(["unzip", "-q", archive, "-d", folder], check=True)
    return folder / SITE / "kit"


# ------------------------------------------------------------------------------- all in order


def test_everything_in_order_passes(federation: Hospitals) -> None:
    project = federation.projects[SITE]
    done = subprocess.run(
        ["sh", "./check-site"],
        cwd=project.folder,
        env={**os.environ, "COMPOSE_PROJECT_NAME": project.name},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split()[0] for line in done.stdout.splitlines() if line[:4].isupper()}
    assert found == {"PASS", "SKIP"}
    assert [line for line in done.stdout.splitlines() if line.startswith("SKIP")] == [
        "SKIP gpu: no GPU is asked for (device: auto)"
    ]
    assert "PASS the trainer side of this site is ready" in done.stdout
    assert "PASS the flare side of this site is ready" in done.stdout


# ------------------------------------------------------------------------ one thing is broken


@dataclass(frozen=True)
class Broken:
    """How to ask the broken site, and what its line says."""

    environment: Mapping[str, str] = field(default_factory=dict)
    override: Mapping[str, Any] | None = None
    options: Sequence[str] = ()
    name: str | None = None


Break = Callable[[Clinic], Broken]
FOREIGN = "foreign"


def edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def kit(change: Callable[[Clinic, Path], object]) -> Break:
    """A kit with something changed in it."""

    def broken(clinic: Clinic) -> Broken:
        folder = clinic.copy("kit")
        change(clinic, folder)
        return Broken({"SITE_KIT": str(folder)})

    return broken


def images(change: Callable[[Path], object]) -> Break:
    """Images with something changed in their folder."""

    def broken(clinic: Clinic) -> Broken:
        folder = clinic.copy("images")
        change(folder)
        return Broken({"SITE_DATA": str(folder)})

    return broken


def policy(change: Callable[[Path], object]) -> Break:
    def broken(clinic: Clinic) -> Broken:
        folder = clinic.copy("policy")
        change(folder)
        return Broken({"SITE_POLICY": str(folder)})

    return broken


def site_yml(old: str, new: str) -> Break:
    def broken(clinic: Clinic) -> Broken:
        return Broken({"SITE_CONFIG": str(edited(clinic.copy("site.yml"), old, new))})

    return broken


def setting(name: str | None = None, **environment: str) -> Break:
    """Another line in .env."""
    return lambda clinic: Broken(environment, name=name)


def compose(**override: Any) -> Break:
    """Another line in compose.yml."""
    return lambda clinic: Broken(override=override)


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


def first(folder: Path, kind: str) -> Path:
    return sorted((folder / kind).iterdir())[0]


def other_kit(clinic: Clinic) -> Broken:
    folder = clinic.scratch / "kit"
    shutil.copytree(clinic.hospitals.folder / "at" / OTHER / "kit", folder)
    return Broken({"SITE_KIT": str(folder)})


def certificate_of(source: Callable[[Clinic], Path]) -> Callable[[Clinic, Path], None]:
    def change(clinic: Clinic, folder: Path) -> None:
        for name in ("client.crt", "client.key"):
            shutil.copy(source(clinic) / "startup" / name, folder / "startup")
        clinic.sign(folder)

    return change


def expire(clinic: Clinic, folder: Path) -> None:
    project = clinic.hospitals.output / clinic.hospitals.name
    with_own_certificate(project, folder, name=SITE, expired=True)


def labels_of_255(folder: Path) -> None:
    import nibabel

    path = first(folder, "labels")
    image = nibabel.load(path)
    values = (image.get_fdata() > 0).astype("uint8") * 255
    nibabel.save(nibabel.Nifti1Image(values, image.affine), path)


def false_checkpoint(clinic: Clinic) -> Broken:
    folder = clinic.scratch / "checkpoints"
    folder.mkdir()
    (folder / "sam_vit_b_01ec64.pth").write_bytes(b"not SAM")
    return Broken({"FEDFMS_CHECKPOINTS": str(folder)})


def another_version(clinic: Clinic) -> Broken:
    """The package of this checkout, which says that it is another one."""
    folder = clinic.scratch / "python"
    shutil.copytree(REPOSITORY / "src/fedfms", folder / "fedfms")
    init = folder / "fedfms/__init__.py"
    init.write_text(init.read_text() + '\n__version__ = "9.9.9"\n')
    # volumes of its own: the trainer that runs is of this version
    return from_folder(folder, "fedfms-check-version")


def another_clock(clinic: Clinic) -> Broken:
    """Python sees a clock that is two minutes slow; nothing in a container can set the host's."""
    folder = clinic.scratch / "python"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import time\nright = time.time\ntime.time = lambda: right() - 120\n"
    )
    return from_folder(folder, None)


def from_folder(folder: Path, name: str | None) -> Broken:
    options = ("-v", f"{folder}:/python:ro", "-e", "PYTHONPATH=/python")
    return Broken(options=options, name=name)


# what is broken: which container looks, the line that fails, a word of its fix
CASES: dict[str, tuple[str, str, str, Break]] = {
    # kit/
    "a kit file edited": (
        *("flare", "kit", "unzip the kit again"),
        kit(lambda clinic, k: edited(k / "local/resources.json", "{", "{ ")),
    ),
    "a kit file cut off": (
        *("flare", "kit", "unzip the kit again"),
        kit(lambda clinic, k: (k / "startup/sub_start.sh").write_bytes(b"")),
    ),
    "a kit file lost": (
        *("flare", "kit", "unzip the kit again"),
        kit(lambda clinic, k: (k / "startup/stop_fl.sh").unlink()),
    ),
    "a kit that its user alone may read": (
        *("flare", "kit", "FEDFMS_UID"),
        setting("fedfms-check-user", FEDFMS_UID="4242"),
    ),
    "an expired certificate": ("flare", "certificate-dates", "renew", kit(expire)),
    "another site's certificate": (
        *("flare", "certificate-name", "as the coordinator sent it"),
        kit(certificate_of(lambda clinic: clinic.hospitals.folder / "at" / OTHER / "kit")),
    ),
    "another site's kit": ("flare", "certificate-name", "SITE_KIT", other_kit),
    # the way to the server
    "a name that DNS does not know": (
        *("flare", "server-name", f"SERVER_EXTRA_HOST={HOST}"),
        setting(SERVER_EXTRA_HOST=""),
    ),
    "a wrong address": (
        *("flare", "server-tcp", "ask the coordinator"),
        setting(SERVER_EXTRA_HOST=f"{HOST}:127.0.0.1"),
    ),
    "an address that a firewall keeps silent": (
        *("flare", "server-tcp", "firewall"),
        # one bridge of Docker does not answer another
        lambda clinic: Broken(
            {"SERVER_EXTRA_HOST": f"{HOST}:{clinic.hospitals.address.rpartition('.')[0]}.250"}
        ),
    ),
    "a server of another name": (
        *("flare", "server-tls", "ask the coordinator"),
        lambda clinic: Broken(
            {
                **kit(lambda c, k: c.sign(k, server_host="fl.other.test"))(clinic).environment,
                "SERVER_EXTRA_HOST": f"fl.other.test:{clinic.hospitals.address}",
            }
        ),
    ),
    "a proxy that is not there": (
        *("flare", "proxy", "SITE_PROXY"),
        setting(SITE_PROXY="http://127.0.0.1:3128"),
    ),
    "a proxy without http://": (
        *("flare", "proxy", "http://HOST:PORT"),
        setting(SITE_PROXY="proxy.clinic.test:3128"),
    ),
    "a slow clock": ("flare", "clock", "chrony", another_clock),
    "an image of another version": ("flare", "version", "FEDFMS_IMAGE", another_version),
    # policy/
    "a policy that lets code in": (
        *("flare", "authorization", "byoc"),
        policy(lambda p: edited(p / "authorization.json", '"byoc": "none"', '"byoc": "any"')),
    ),
    "no authorization": (
        *("flare", "authorization", "policy/ back"),
        policy(lambda p: (p / "authorization.json").unlink()),
    ),
    "no privacy policy": (
        *("trainer", "privacy", "policy/privacy.json"),
        policy(lambda p: (p / "privacy.json").unlink()),
    ),
    "a misspelt privacy policy": (
        *("trainer", "privacy", "max_rounds"),
        policy(lambda p: edited(p / "privacy.json", "max_rounds", "max_round")),
    ),
    # site.yml
    "a misspelt key": ("trainer", "site-yml", "did you mean", site_yml("labels:", "label:")),
    "a GPU that is not there": (
        *("trainer", "gpu", "nvidia-smi"),
        site_yml("format:", "device: cuda\nformat:"),
    ),
    "more workers than shared memory": (
        *("trainer", "shared-memory", "TRAINER_SHM"),
        lambda clinic: Broken(
            {
                **site_yml("format:", "workers: 2\nformat:")(clinic).environment,
                "TRAINER_SHM": "64m",
            }
        ),
    ),
    # images
    "a folder without images": (
        *("trainer", "data-folder", "is SITE_DATA in .env the right folder?"),
        lambda clinic: Broken({"SITE_DATA": str(new_folder(clinic.scratch / "none"))}),
    ),
    "an image without its label": (
        *("trainer", "data", "label"),
        images(lambda folder: first(folder, "labels").unlink()),
    ),
    "a file cut off": (
        *("trainer", "data", ""),
        images(lambda folder: os.truncate(first(folder, "images"), 1000)),
    ),
    "label values that site.yml does not name": (
        *("trainer", "data", "under its class"),
        images(labels_of_255),
    ),
    # .env and compose.yml
    "images that can be written": (
        *("trainer", "data-read-only", "read_only: true"),
        lambda clinic: Broken(override={"volumes": [f"{clinic.copy('images')}:/data"]}),
    ),
    "a trainer with a network": (
        *("trainer", "network", "network_mode: none"),
        compose(network_mode="host"),
    ),
    "a GPU overlay without a GPU": (
        *("trainer", "gpu", "COMPOSE_FILE"),
        compose(environment={"FEDFMS_REQUIRE_GPU": "1"}),
    ),
    "a false checkpoint": ("trainer", "checkpoints", "sha256sum", false_checkpoint),
    "too little memory": ("trainer", "memory", "TRAINER_MEMORY", setting(TRAINER_MEMORY="600m")),
    "a small exchange, seen by the trainer": (
        *("trainer", "exchange-size", "EXCHANGE_SIZE"),
        setting("fedfms-check-small", EXCHANGE_SIZE="50m"),
    ),
    "a small exchange, seen by the FLARE client": (
        *("flare", "exchange-size", "EXCHANGE_SIZE"),
        setting("fedfms-check-small", EXCHANGE_SIZE="50m"),
    ),
    "a work volume that cannot be written": (
        *("trainer", "work", "FEDFMS_UID"),
        compose(volumes=[f"{SITE}-work:/work:ro"]),
    ),
    "an exchange that cannot be written": (
        *("trainer", "exchange", "FEDFMS_UID"),
        compose(volumes=[f"{SITE}-exchange:/exchange:ro"]),
    ),
    "a workspace that cannot be written": (
        *("flare", "workspace", "FEDFMS_UID"),
        compose(volumes=[f"{SITE}-workspace:/workspace:ro"]),
    ),
}


def one_line_fails(found: tuple[int, list[dict[str, str]]], code: str, fix: str) -> dict[str, str]:
    """Exactly this item fails, says what to do, and the exit code tells."""
    exit_code, items = found
    failed = [item for item in items if item["status"] == "FAIL"]
    assert {item["code"] for item in failed} == {code}, failed
    assert exit_code == 1
    assert all(item["fix"] for item in failed)
    assert fix in " ".join(item["fix"] for item in failed), failed
    return failed[0]


@pytest.mark.parametrize("what", CASES)
def test_the_line_of_what_is_broken_fails(clinic: Clinic, what: str) -> None:
    part, code, fix, break_it = CASES[what]
    broken = break_it(clinic)
    found = clinic.check(
        part,
        *broken.options,
        environment=broken.environment,
        override=broken.override,
        name=broken.name,
    )
    one_line_fails(found, code, fix)


def test_a_certificate_of_another_authority(clinic: Clinic, foreign: Path) -> None:
    folder = clinic.copy("kit")
    certificate_of(lambda _: foreign)(clinic, folder)
    found = clinic.check("flare", environment={"SITE_KIT": str(folder)})
    one_line_fails(found, "certificate-ca", "ask the coordinator")


def test_the_kit_of_another_project(clinic: Clinic, foreign: Path) -> None:
    shutil.copytree(foreign, clinic.scratch / "kit")
    found = clinic.check("flare", environment={"SITE_KIT": str(clinic.scratch / "kit")})
    one_line_fails(found, "server-tls", "another project")


# ------------------------------------------------------------------- before a container is started


def by_script(
    clinic: Clinic, *arguments: str, name: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """./check-site with other lines in .env."""
    project = Project(clinic.project.folder, name or clinic.project.name, environment)
    try:
        return subprocess.run(
            ["sh", "./check-site", *arguments],
            cwd=project.folder,
            env={**os.environ, "COMPOSE_PROJECT_NAME": project.name, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        if name is not None:
            project.down()


@pytest.mark.parametrize(
    "variable", ["SITE_DATA", "SITE_CONFIG", "SITE_POLICY", "SITE_KIT", "FEDFMS_CHECKPOINTS"]
)
def test_a_folder_that_is_not_there_is_named_and_not_made(clinic: Clinic, variable: str) -> None:
    typo = clinic.scratch / "does not exist"
    done = by_script(clinic, **{variable: str(typo)})
    assert done.returncode == 1
    assert f"there is no {typo} on this machine" in done.stderr, done.stderr
    fix = {"SITE_KIT": "unzip the kit"}.get(variable, variable)
    assert fix in done.stderr
    if variable == "SITE_DATA":
        project = Project(clinic.project.folder, "fedfms-check-typo", {variable: str(typo)})
        try:
            assert project.run("up", "-d", check=False).returncode != 0
        finally:
            project.down()
    assert not typo.exists()


def test_no_container_of_a_kit_runs_as_root(clinic: Clinic) -> None:
    for project in (clinic.project, clinic.hospitals.projects[HOST]):
        for container in project.containers().values():
            assert container["Config"]["User"] == f"{USER}:10001"


@pytest.mark.parametrize("uid", ["0", "00", "root", "0:0", "jane"])
def test_root_is_refused_by_check_site(clinic: Clinic, uid: str) -> None:
    done = by_script(clinic, name="fedfms-check-root", FEDFMS_UID=uid)
    said = "FEDFMS_UID or SITE_DATA_GID" if uid == "jane" else "runs as root"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count(said) == 1, done.stderr
    assert "fix:" in done.stderr


def test_root_is_refused_at_every_other_start(clinic: Clinic) -> None:
    project = Project(clinic.project.folder, "fedfms-check-root", {"FEDFMS_UID": "0"})
    trainer, flare = f"{SITE}-trainer", f"{SITE}-flare"
    job = "fedmsa"
    try:
        for command in (("dry-run",), ("train-local", job, "--site", "/site/site.yml")):
            done = project.run("run", "--rm", "--no-deps", "-T", trainer, *command, check=False)
            assert done.returncode != 0 and "runs as root" in done.stdout, done.stdout
        past = ("run", "--rm", "--no-deps", "-T", "--entrypoint", "fedfms", trainer, "dry-run")
        done = project.run(*past, check=False)
        assert done.returncode != 0 and "runs as root" in done.stdout, done.stdout
        project.run("up", "-d", "--no-deps", trainer, flare)
        for service in (trainer, flare):
            wait_until(
                lambda service=service: "runs as root" in project.logs(service), 30, "it says so"
            )
            assert "is ready" not in project.logs(service)
    finally:
        project.down()
    for role in (("server",), ("coordinator", job, "--kit", "/kit")):
        run = ("docker", "run", "--rm", "--user", "0", "--network", "none")
        done = subprocess.run(
            [*run, clinic.hospitals.image, *role], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 77 and "runs as root" in done.stderr


def test_a_gpu_that_is_not_here_and_an_image_that_is_not(clinic: Clinic) -> None:
    overlay = {"COMPOSE_FILE": "compose.yml:compose.gpu.yml"}
    done = by_script(clinic, **overlay, FEDFMS_GPU_IMAGE="noimage:1")
    assert done.returncode == 1
    assert "noimage:1 is not on this machine" in done.stderr and "docker load" in done.stderr
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    done = by_script(clinic, **overlay, FEDFMS_GPU_IMAGE=clinic.hospitals.image)
    assert done.returncode == 1
    assert done.stderr.count("this host has no NVIDIA driver") == 1
    assert "could not select device driver" not in done.stderr
    assert "PASS the flare side" in done.stdout and "trainer side" not in done.stdout


def test_a_container_that_does_one_thing_is_not_unhealthy(clinic: Clinic) -> None:
    probe = "python -m fedfms.preflight.health trainer"
    started = clinic.project.run(
        *("run", "-d", "--no-deps", f"{SITE}-trainer"),
        *("train-local", "fedmsa", "--site", "/site/site.yml"),
        *("--set", "rounds=50", "--set", "classes=lesion"),
    )
    container = started.stdout.split()[-1]
    try:
        said = docker("exec", container, *probe.split())
        assert "started for one thing, train-local" in said
    finally:
        docker("rm", "-f", container)


# -------------------------------------------------------------------------------- behind a proxy


@pytest.fixture
def proxy(federation: Hospitals) -> Iterator[str]:
    """An HTTP proxy beside the site, which alone can look the server up; its container's name."""
    container = f"{federation.name}-proxy"
    docker("rm", "-f", container, check=False)
    docker(
        *("run", "-d", "--name", container, "--init", "--network", federation.outside),
        *("--add-host", f"{HOST}:{federation.address}", "-v", f"{LITTLE_PROXY}:/proxy.py:ro"),
        *("-p", f"{federation.address}::{PROXY_PORT}", "--entrypoint", "python"),
        *(federation.image, "/proxy.py", PROXY_PORT),
    )
    yield container
    docker("rm", "-f", container)


def test_a_site_behind_a_proxy_is_in_the_federation(clinic: Clinic, proxy: str) -> None:
    address = docker("port", proxy, f"{PROXY_PORT}/tcp").strip()
    behind = {"SITE_PROXY": f"http://{address}", "SERVER_EXTRA_HOST": ""}
    time.sleep(1)
    exit_code, items = clinic.check("flare", environment=behind)
    assert exit_code == 0, items
    texts = {item["code"]: item["text"] for item in items}
    assert texts["proxy"] == f"through http://{address} (https_proxy)"

    # and FLARE itself, in its own container, with the health check that compose runs
    site = Project(clinic.project.folder, clinic.project.name, behind)
    site.run("up", "-d")
    flare = f"{SITE}-flare"
    try:
        wait_until(
            lambda: "Successfully registered client" in site.logs(flare), 60, "it is registered"
        )
        wait_until(lambda: healthy(site), 60, "it is healthy")
        said = site.run("exec", "-T", flare, "fedfms", "health", "flare").stdout
        assert f"connected to {HOST} through the proxy http://{address}" in said
    finally:
        clinic.project.run("up", "-d")


# -------------------------------------------------------------------------------- at the end


def test_a_server_that_is_stopped(clinic: Clinic) -> None:
    server = clinic.hospitals.projects[HOST]
    server.run("stop", "-t", "5")
    one_line_fails(clinic.check("flare"), "server-tcp", "ask the coordinator whether the server")
