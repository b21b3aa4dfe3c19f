"""Kits at hospitals: four sites with real images, each started alone, and what can go wrong."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from certificates import not_after, public_key_of_ca, serial, with_own_certificate
from containers import Project, docker, files_that_name, wait_until
from hospitals import (
    COORDINATOR,
    HOST,
    MEMBER,
    USER,
    Hospitals,
    digest_tree,
    fedfms,
    hospital_images,
    members,
    write_site,
    zips,
)

from fedfms.flare.session import prepare_job
from terminal import Console

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(900)]

JOBS = Path(__file__).resolve().parents[2] / "jobs"
# site -> scanner, first volume, number of volumes, how its files are called
SITES = {
    "scanner-a": ("scanner-a", 0, 8, "MRN7301-aalto"),
    "scanner-b": ("scanner-b", 0, 8, "MRN7302-brandt"),
    "scanner-c": ("scanner-c", 0, 8, "MRN7303-castro"),
    "scanner-d": ("scanner-c", 8, 6, "MRN7304-dubois"),  # never trains
}
PATIENTS = [name for *_, name in SITES.values()]
POLICY = {"min_cases": 1, "max_rounds": 3}
RECIPE = ("classes=hippocampus", "holdout=scanner-d", "local_epochs=1")
SHORT = [*RECIPE, "rounds=1"]


@pytest.fixture(scope="module")
def hospitals(
    image: str, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hospitals]:
    """All participants, with kits and images, not started yet."""
    folder = tmp_path_factory.mktemp("federation")
    all_of_them = Hospitals(folder, image, list(SITES))
    all_of_them.provision()
    all_of_them.jobs.chmod(0o777)
    for person in (COORDINATOR, MEMBER):
        all_of_them.unzip(person)
    all_of_them.install(HOST, SERVER_PUBLISH=all_of_them.port, FEDFMS_LOG_LEVEL="debug")
    for site, (scanner, first, count, prefix) in SITES.items():
        source = shared_data / "hippocampus" / scanner
        data = hospital_images(source, folder / "images" / site, first, count, prefix)
        project = all_of_them.install(site, SITE_DATA=data, FEDFMS_LOG_LEVEL="debug")
        write_site(project.folder, scanner, POLICY)
        order_from_seed(project)
    yield all_of_them
    all_of_them.down()


def order_from_seed(project: Project) -> None:
    """Without the secret that a hospital's order of slices follows from, runs can be compared."""
    file = project.folder / "compose.yml"
    before, trainer, after = file.read_text().partition("      FEDFMS_EXCHANGE: /exchange\n")
    assert trainer and "-trainer:" in before
    file.write_text(f'{before}{trainer}      FEDFMS_ORDER_FROM_SEED: "1"\n{after}')


def ready(hospitals: Hospitals) -> list[str]:
    """Names of the sites that are connected and ready."""
    said = hospitals.coordinate("status", "--json", check=False)
    if said.returncode != 0:
        return []
    sites = json.loads(said.stdout[said.stdout.index("{") :])["sites"]
    return sorted(site["site"] for site in sites if site["ready"])


@pytest.fixture(scope="module")
def running(hospitals: Hospitals) -> Hospitals:
    """Every participant started alone, by its own compose file."""
    for participant in (HOST, *SITES):
        hospitals.projects[participant].run("up", "-d")
    wait_until(lambda: ready(hospitals) == sorted(SITES), 180, "four sites are ready")
    return hospitals


def dice(results: Path) -> dict[tuple[str, str, str], float]:
    """(site, model, class) -> mean Dice."""
    with (results / "evaluation.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "dice"]
    return {(row["site"], row["model"], row["class"]): float(row["mean"]) for row in rows}


# ---------------------------------------------------------------------------- before the start


def check_site(project: Project, *arguments: str) -> tuple[int, dict[str, str], str]:
    """Run the kit's own check-site; exit code, item -> verdict, and all it said."""
    done = subprocess.run(
        ["sh", "./check-site", "--json", *arguments],
        cwd=project.folder,
        env={**os.environ, "COMPOSE_PROJECT_NAME": project.name},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    verdicts: dict[str, str] = {}
    decoder, text = json.JSONDecoder(), done.stdout
    while (start := min((i for i in (text.find("["), text.find("{")) if i >= 0), default=-1)) >= 0:
        found, end = decoder.raw_decode(text[start:])
        items = found["items"] if isinstance(found, dict) else found
        verdicts.update({item["code"]: item["status"] for item in items})
        text = text[start + end :]
    return done.returncode, verdicts, done.stdout + done.stderr


# ------------------------------------------------------------------------------- three ways in


@pytest.fixture(scope="module")
def prepared(running: Hospitals) -> Path:
    """A copy of jobs/fedmsa for one round, below the coordinator's folder."""
    job = prepare_job(JOBS / "fedmsa", running.jobs / "one-round", SHORT)
    subprocess.run(["chown", "-R", f"{USER}:{USER}", job.folder], check=True)
    return job.folder


def finished(hospitals: Hospitals, job_id: str) -> str:
    """Wait for a job's end; FLARE's status."""
    done = hospitals.coordinate("watch", job_id, check=False)
    assert done.returncode == 0, done.stdout
    said = hospitals.coordinate("status", job_id, "--json").stdout
    return str(json.loads(said[said.index("{") :])["status"])


def test_a_job_from_flares_console(running: Hospitals, prepared: Path) -> None:
    kit = running.folder / "at" / COORDINATOR / "kit"
    transfer = kit / "transfer"
    shutil.copytree(prepared, transfer / "one-round")
    subprocess.run(["chown", "-R", f"{USER}:{USER}", transfer], check=True)
    command = running.at_the_coordinators(
        COORDINATOR, "-it", "--entrypoint", "/kit/startup/fl_admin.sh"
    )
    with Console([*command, running.image]) as console:
        console.wait_for("User Name: ")
        console.type(COORDINATOR)
        console.wait_for("> ")
        console.type("submit_job one-round")
        job_id = console.wait_for(r"Submitted job: ([0-9a-f-]{36})").group(1)
        console.wait_for("> ")
        console.type("bye")
        console.wait_for_end()
    assert finished(running, job_id) == "FINISHED:COMPLETED"


def nvflare_submit(hospitals: Hospitals, folder: Path) -> str:
    """Submit a folder below jobs/ with FLARE's own command; the job's id."""
    subprocess.run(["chown", "-R", f"{USER}:{USER}", folder], check=True)
    command = hospitals.at_the_coordinators(COORDINATOR, "--entrypoint", "nvflare")
    arguments = ("job", "submit", "-j", f"/jobs/{folder.name}", "--startup-kit", "/kit")
    done = subprocess.run(
        [*command, hospitals.image, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", done.stdout)
    assert found is not None, done.stdout
    return found.group()


def test_a_job_from_nvflare_job_submit(running: Hospitals, prepared: Path) -> None:
    job_id = nvflare_submit(running, prepared)
    assert finished(running, job_id) == "FINISHED:COMPLETED"
    running.coordinate("fetch", job_id, "--results", "/jobs/of-nvflare")
    assert dice(running.jobs / "of-nvflare")


# ---------------------------------------------------------------- the same as without containers


@dataclass
class Both:
    """The same job in containers and as processes."""

    containers: Path
    processes: Path
    images_before: dict[str, tuple[bytes, int, float]]


@pytest.fixture(scope="module")
def both(running: Hospitals) -> Both:
    images = running.folder / "images"
    before = digest_tree(images)
    settings = [part for text in [*RECIPE, "rounds=2"] for part in ("--set", text)]
    started = time.monotonic()
    running.coordinate(
        *("submit", "fedmsa", *settings, "--watch", "--workspace", "/jobs/ws"),
        *("--results", "/jobs/of-submit"),
    )
    in_containers = time.monotonic() - started
    sites = running.folder / "simulated-sites"
    for site, (scanner, *_) in SITES.items():
        (sites / site).mkdir(parents=True)
        write_site(sites / site, scanner, POLICY)
    results = running.folder / "of-simulate"
    started = time.monotonic()
    fedfms(
        *("simulate", JOBS / "fedmsa", "--sites", sites, "--data", images, *settings),
        *("--results", results, "--workspace", running.folder / "ws"),
    )
    as_processes = time.monotonic() - started
    print(f"2 rounds: {in_containers:.0f} s in containers, {as_processes:.0f} s as processes")
    return Both(running.jobs / "of-submit", results, before)


def test_containers_and_processes_give_the_same_scores(both: Both) -> None:
    here, there = dice(both.containers), dice(both.processes)
    assert set(here) == set(there) and {site for site, *_ in here} == set(SITES)
    largest = max(abs(here[key] - there[key]) for key in here)
    print(f"largest difference in mean Dice: {largest:.1e}")
    assert largest <= 1e-3


def test_the_images_are_as_they_were_and_cannot_be_written(both: Both, running: Hospitals) -> None:
    assert digest_tree(running.folder / "images") == both.images_before
    done = running.projects["scanner-a"].run(
        *("exec", "-T", "scanner-a-trainer", "sh", "-c", "touch /data/x || touch /data/images/x"),
        check=False,
    )
    assert done.returncode != 0
    assert "Read-only file system" in done.stdout


def test_no_image_name_or_patient_leaves_a_trainer(both: Both, running: Hospitals) -> None:
    places = [both.containers, running.jobs, running.projects[HOST].volume("server-workspace")]
    for site in SITES:
        places.append(running.projects[site].volume(f"{site}-workspace"))
    for participant in (HOST, *SITES):
        service = "server" if participant == HOST else f"{participant}-flare"
        log = running.folder / f"{participant}.log"
        log.write_text(running.projects[participant].logs(service))
        assert "DEBUG" in log.read_text(), participant
        places.append(log)
    assert files_that_name(PATIENTS, *places) == {}
    own = running.projects["scanner-a"].volume("scanner-a-work")
    assert files_that_name(PATIENTS, own)  # what is there to be found is found


def test_a_site_predicts_with_its_trainers_container(
    both: Both, running: Hospitals, tmp_path: Path
) -> None:
    """The masks of a hospital's own images, written by its kit, are those that were scored."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in (masks, *list(masks.parents)[:3]):
        path.chmod(0o755)
    os.chown(masks, USER, USER)
    running.projects["scanner-d"].run(
        *("run", "--rm", "--no-deps", "-v", f"{both.containers}:/model:ro"),
        *("-v", f"{masks}:/masks", "scanner-d-trainer"),
        *("predict", "/model", "/data/images", "/masks", "--site", "/site/site.yml"),
    )
    of_cases = []
    for truth in sorted((running.folder / "images/scanner-d/labels").iterdir()):
        written, labels = nibabel.load(masks / truth.name), nibabel.load(truth)
        assert np.array_equal(written.affine, labels.affine)
        mask, label = (np.asarray(image.dataobj) > 0 for image in (written, labels))
        of_cases.append(2 * (mask & label).sum() / (mask.sum() + label.sum()))
    assert len(of_cases) == 6
    scored = dice(both.containers)["scanner-d", "final", "hippocampus"]
    assert np.mean(of_cases) == pytest.approx(scored, abs=6e-4)  # it leaves in three decimals


# ----------------------------------------------------------------------------------- refusals


def flare_says(
    hospitals: Hospitals, site: str, kit: Path, expected: str, name: str = "", seconds: float = 60
) -> str:
    """Start a site's FLARE container with another kit; what it says until `expected` is in it."""
    container = f"{hospitals.name}-refused"
    docker("rm", "-f", "-v", container, check=False)
    policy = hospitals.projects[site].folder / "policy"
    subprocess.run(["chown", "-R", f"{USER}:{USER}", kit], check=True)
    docker(
        *("run", "-d", "--name", container, "--user", f"{USER}:10001", "--init"),
        *("--network", hospitals.outside, "--add-host", f"{HOST}:{hospitals.address}"),
        *("-e", f"SITE_NAME={name or site}"),
        *("-v", f"{kit}:/kit:ro", "-v", f"{policy}:/policy:ro", "-v", "/workspace"),
        *("-e", "FEDFMS_EXCHANGE=/exchange", hospitals.image, "flare"),
    )
    said = ""

    def heard() -> bool:
        nonlocal said
        done = subprocess.run(["docker", "logs", container], capture_output=True, text=True)
        said = done.stdout + done.stderr
        return expected in said

    try:
        wait_until(heard, seconds, f"{expected!r} in what it says: {said}")
    except AssertionError:
        raise AssertionError(f"{expected!r} is not in: {said}") from None
    finally:
        docker("rm", "-f", "-v", container, check=False)
    return said


def test_a_kit_of_another_authority_is_told_so(running: Hospitals, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    project = tmp_path / "project.yml"
    shutil.copy(running.project_file, project)
    fedfms("provision", project, "--output", tmp_path / "output")
    archive = tmp_path / "output" / "kits" / "scanner-a.zip"
    subprocess.run(["unzip", "-q", archive, "-d", tmp_path], check=True)
    kit = tmp_path / "scanner-a" / "kit"
    said = flare_says(running, "scanner-a", kit, "another", seconds=90)
    assert "fix:" in said


def test_a_certificate_under_another_sites_name_is_refused(
    running: Hospitals, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    kit = tmp_path / "kit"
    shutil.copytree(running.projects["scanner-b"].folder / "kit", kit)
    for name in ("client.crt", "client.key"):
        shutil.copy(running.projects["scanner-a"].folder / "kit/startup" / name, kit / "startup")
    flare_says(running, "scanner-b", kit, "startup/client.crt")
    # with checksums that fit, the name in the certificate still does not
    with_own_certificate(running.output / running.name, kit)
    said = flare_says(running, "scanner-b", kit, "scanner-a")
    assert "fix:" in said


def test_an_expired_certificate_is_named_with_its_date(running: Hospitals, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    kit = tmp_path / "kit"
    shutil.copytree(running.projects["scanner-a"].folder / "kit", kit)
    ended = with_own_certificate(running.output / running.name, kit, name="scanner-a", expired=True)
    said = flare_says(running, "scanner-a", kit, f"{ended:%Y-%m-%d}")
    assert "fix:" in said and "renew" in said


def test_a_changed_kit_does_not_start(running: Hospitals, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    kit = tmp_path / "kit"
    shutil.copytree(running.projects["scanner-a"].folder / "kit", kit)
    settings = kit / "startup" / "fed_client.json"
    settings.write_text(settings.read_text().replace("grpc", "tcp"))
    assert "fix:" in flare_says(running, "scanner-a", kit, "startup/fed_client.json")


def refused_job(hospitals: Hospitals, folder: Path) -> str:
    """Submit a folder with FLARE's own command; what we are told of its end."""
    job_id = nvflare_submit(hospitals, folder)
    watched = hospitals.coordinate("watch", job_id, check=False)
    assert watched.returncode == 1, watched.stdout
    return watched.stdout + hospitals.coordinate("status", job_id).stdout


def test_a_job_with_code_is_refused_by_submit_and_by_the_sites(running: Hospitals) -> None:
    job = prepare_job(JOBS / "fedmsa", running.jobs / "with-code", SHORT).folder
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "code.py").write_text("print('here')\n")
    ours = running.coordinate("submit", "/jobs/with-code", check=False)
    assert ours.returncode == 1 and "custom" in ours.stdout and "fix:" in ours.stdout
    assert "BYOC not permitted" in refused_job(running, job)


def test_a_class_outside_the_list_is_refused_at_the_site(running: Hospitals) -> None:
    job = prepare_job(JOBS / "fedmsa", running.jobs / "foreign-class", SHORT).folder
    path = job / "app/config/config_fed_client.json"
    client = json.loads(path.read_text())
    client["components"].append({"id": "loads-pickles", "path": "torch.load", "args": {"f": "x"}})
    path.write_text(json.dumps(client))
    refused_job(running, job)
    said = running.projects["scanner-a"].logs("scanner-a-flare")
    assert "'torch.load' at config path 'components.#1' is not in allow_list" in said


def test_a_recipe_beyond_the_sites_policy_is_refused_on_both_sides(running: Hospitals) -> None:
    settings = [part for text in [*RECIPE, "rounds=4"] for part in ("--set", text)]
    ours = running.coordinate("submit", "fedmsa", *settings, check=False)
    assert ours.returncode == 1, ours.stdout
    assert "scanner-a" in ours.stdout and "rounds" in ours.stdout and "fix:" in ours.stdout
    job = prepare_job(JOBS / "fedmsa", running.jobs / "too-long", [*RECIPE, "rounds=4"]).folder
    said = refused_job(running, job)
    refusing = re.search(r"(scanner-\w) in round 0: .*\(too-many-rounds\)", said)
    assert refusing is not None, said
    site = refusing.group(1)  # the job may end before the others have answered
    errors = running.projects[site].run("exec", "-T", f"{site}-trainer", "cat", "/work/errors.log")
    assert "the site's policy allows at most 3 rounds (max_rounds)" in errors.stdout


def test_a_member_may_look_and_not_submit(running: Hospitals) -> None:
    settings = [part for text in SHORT for part in ("--set", text)]
    done = running.coordinate("submit", "fedmsa", *settings, user=MEMBER, check=False)
    assert done.returncode == 1
    assert "member" in done.stdout and "project_admin" in done.stdout, done.stdout
    assert "scanner-a" in running.coordinate("status", user=MEMBER).stdout


def test_a_shell_command_from_the_server_is_refused(running: Hospitals) -> None:
    # asked by a person whose organisation the site would believe to be its own
    script = (
        "from nvflare.fuel.flare_api.flare_api import new_secure_session\n"
        f"session = new_secure_session({COORDINATOR!r}, '/kit', timeout=20)\n"
        "for ask in (session.cat_target, session.tail_target):\n"
        "    try:\n"
        "        print('GOT', ask('scanner-a', file='/etc/hostname'))\n"
        "    except Exception as error:\n"
        "        print('REFUSED', error)\n"
        "session.close()\n"
    )
    command = running.at_the_coordinators(COORDINATOR, "--entrypoint", "python")
    done = subprocess.run(
        [*command, running.image, "-u", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("REFUSED") == 2, done.stdout + done.stderr
    assert "GOT" not in done.stdout


# ----------------------------------------------------------------- containers that die in a run


def kill_main_process(project: Project, service: str) -> None:
    """`kill -9` from the host: the container's restart policy starts it again."""
    container = project.run("ps", "-q", service).stdout.strip()
    pid = docker("inspect", "--format", "{{.State.Pid}}", container).strip()
    os.kill(int(pid), signal.SIGKILL)


def test_containers_that_are_killed_come_back_into_the_same_run(running: Hospitals) -> None:
    texts = ["classes=hippocampus", "holdout=scanner-d", "rounds=3", "local_epochs=6"]
    settings = [part for text in texts for part in ("--set", text)]
    said = running.coordinate("submit", "fedmsa", *settings, "--json").stdout
    job_id = json.loads(said[said.index("{") :])["job_id"]
    server = running.projects[HOST]

    def rounds_done() -> int:
        done = server.run("exec", "-T", "server", "ls", f"/workspace/runs/{job_id}", check=False)
        return max((int(name[6:]) for name in re.findall(r"round-\d+", done.stdout)), default=0)

    wait_until(lambda: rounds_done() == 1, 180, "a round is done")
    kill_main_process(running.projects["scanner-b"], "scanner-b-flare")
    kill_main_process(running.projects["scanner-c"], "scanner-c-trainer")
    wait_until(lambda: rounds_done() == 2, 240, "two rounds are done")
    kill_main_process(server, "server")
    assert finished(running, job_id) == "FINISHED:COMPLETED"
    results = running.jobs / "of-killed"
    running.coordinate("fetch", job_id, "--results", "/jobs/of-killed")
    records = [json.loads(line) for line in (results / "records.jsonl").read_text().splitlines()]
    rounds = {record["round"]: record for record in records if record["record"] == "round_done"}
    assert sorted(rounds) == [0, 1, 2]
    assert [record["round"] for record in records if record["record"] == "resumed"] == [2]
    assert rounds[2]["sites"] == sorted(SITES)  # all of them are back
    notes = {(r["kind"], r["site"]) for r in records if r["record"] == "note"}
    assert ("site_back", "scanner-b") in notes


# --------------------------------------------------------------- a federation that changes


def test_a_fifth_site_joins_and_leaves_and_nobody_else_notices(running: Hospitals) -> None:
    before = zips(running.output)
    running.sites.append("scanner-e")
    running.provision()
    after = zips(running.output)
    assert set(after) - set(before) == {"scanner-e.zip"}
    assert {name: after[name] for name in before} == before

    data = running.folder / "images" / "scanner-d"
    fifth = running.install("scanner-e", SITE_DATA=data)
    write_site(fifth.folder, "scanner-c", POLICY)
    fifth.run("up", "-d")
    wait_until(lambda: "scanner-e" in ready(running), 120, "the fifth site is ready")

    said = running.provision("--revoke", "scanner-e")
    assert "fedfms revoke scanner-e" in said
    assert set(zips(running.output)) == set(before)
    running.coordinate("revoke", "scanner-e")
    wait_until(lambda: ready(running) == sorted(SITES), 60, "the fifth site is out")
    fifth.run("restart", "scanner-e-flare")
    time.sleep(20)
    assert ready(running) == sorted(SITES)  # it tries and is not let in
    code, verdicts, _ = check_site(fifth)
    assert code == 1 and verdicts["revoked"] == "FAIL"
    settings = [part for text in SHORT for part in ("--set", text)]
    running.coordinate(
        *("submit", "fedmsa", *settings, "--watch"),
        *("--workspace", "/jobs/ws", "--results", "/jobs/after-revocation"),
    )
    fifth.down()


def test_renewing_one_certificate_changes_one_kit(running: Hospitals) -> None:
    before = zips(running.output)
    old = running.projects["scanner-b"].folder / "kit"
    time.sleep(1.1)  # a certificate counts in seconds
    running.provision("--renew", "scanner-b")
    after = zips(running.output)
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {"scanner-b.zip"}
    new = members(running.output / "kits" / "scanner-b.zip")
    certificate = new["scanner-b/kit/startup/client.crt"]
    old_certificate = (old / "startup/client.crt").read_bytes()
    assert serial(certificate) != serial(old_certificate)
    assert not_after(certificate) > not_after(old_certificate)
    authority = new["scanner-b/kit/startup/rootCA.pem"]
    assert public_key_of_ca(authority) == public_key_of_ca(
        (old / "startup/rootCA.pem").read_bytes()
    )

    # the site puts the new kit/ in the place of the old one
    project = running.projects["scanner-b"]
    shutil.rmtree(old)
    fresh = running.folder / "fresh"
    subprocess.run(
        ["unzip", "-q", running.output / "kits" / "scanner-b.zip", "-d", fresh], check=True
    )
    shutil.move(fresh / "scanner-b" / "kit", old)
    subprocess.run(["chown", "-R", f"{USER}:{USER}", old], check=True)
    project.run("up", "-d", "--force-recreate")
    wait_until(lambda: ready(running) == sorted(SITES), 120, "the renewed site is back")
