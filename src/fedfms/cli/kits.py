"""Commands that make kits: provisioning, keys that sites make themselves, archives of images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from fedfms.cli.common import WholeWords, err, out, styled

if TYPE_CHECKING:
    from fedfms.provisioning.provision import Provisioned

commands = typer.Typer()

ProjectFile = Annotated[
    Path, typer.Argument(metavar="PROJECT.yml", help="Such as provisioning/project.yml.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="For the zips, the CA and all keys: kept, backed up, for you only. "
        "Otherwise workspace/PROJECT."
    ),
]


@commands.command()
def provision(
    project: ProjectFile,
    output: Output = None,
    renew: Annotated[
        list[str],
        typer.Option(
            metavar="NAME", help="New key and certificate for this participant; repeatable."
        ),
    ] = [],  # noqa: B006 - typer reads it and does not change it
    revoke: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="No kit for this participant any more; repeatable."),
    ] = [],  # noqa: B006
    unpack: Annotated[
        Path | None,
        typer.Option(help="Also lay out each kit here, for containers on this machine."),
    ] = None,
    image: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=sha256:…]",
            help="An image of the federation: each kit says its digest; repeatable, remembered.",
        ),
    ] = [],  # noqa: B006
    sent: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="This participant has its kit: remove its private key and its zip here; "
            "repeatable.",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Make one zip for each participant of project.yml; again changes only what must change."""
    from fedfms.provisioning.provision import provision as run

    _show(run(project, output, renew=renew, revoke=revoke, unpack=unpack, images=image, sent=sent))


@commands.command("new-site")
def new_site(
    name: Annotated[str, typer.Argument(help="The site's name, as in project.yml.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for its files.")],
) -> None:
    """Write the files that a site owns: site.yml, policy/, .env, compose files."""
    from fedfms.provisioning.render import new_site as write

    write(name, folder)
    out.print(f"{folder}: edit .env and site.yml, then look at your data:")
    config = shlex.quote(str(folder / "site.yml"))
    out.print(f"  fedfms check-data {config} --data /path/to/your/images")


@commands.command()
def request(
    name: Annotated[str, typer.Argument(help="The site's name, as in project.yml.")],
    org: Annotated[str, typer.Option(help="Its organisation, as in project.yml.")],
    project: Annotated[str, typer.Option(help="The project's name, as in project.yml.")],
    output: Annotated[
        Path | None, typer.Option(help="New folder for the key. Otherwise NAME-request.")
    ] = None,
) -> None:
    """At a site: make a key that stays here, and a request for a certificate, to be sent."""
    from fedfms.provisioning.own_key import request as make

    made = make(name, org, project, output or Path(f"{name}-request"))
    out.print(f"send {made.file} to the coordinator")
    out.print(f"tell the coordinator, by another way such as the telephone: {made.key}")
    out.print(f"keep {made.folder}: its {name}.key is private")


@commands.command()
def approve(
    request_file: Annotated[Path, typer.Argument(metavar="REQUEST.zip", help="From the site.")],
    project: ProjectFile,
    fingerprint: Annotated[str, typer.Option(help="The key's fingerprint, as the site told it.")],
    output: Output = None,
    renew: Annotated[bool, typer.Option("--renew", help="In the place of an older key.")] = False,
) -> None:
    """At the coordinator: sign a site's request under the project's CA, and make its kit."""
    from fedfms.provisioning.own_key import approve as run

    _show(run(request_file, project, fingerprint, output, renew))
    out.print("tell the site the fingerprint of the certificate authority, by another way")


@commands.command()
def install(
    kit: Annotated[Path, typer.Argument(metavar="SITE.zip", help="From the coordinator.")],
    request_folder: Annotated[
        Path, typer.Option("--request", help="The folder that fedfms request made.")
    ],
    fingerprint: Annotated[
        str, typer.Option(help="The certificate authority's, as the coordinator told it.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The site's folder. Otherwise beside the zip, by the site's name."),
    ] = None,
) -> None:
    """At a site: check the kit that came back, and put the site's own key into it."""
    from fedfms.provisioning.own_key import install as run

    folder = run(kit, request_folder, fingerprint, output)
    out.print(f"{folder}: edit .env and site.yml, then ./check-site")


@commands.command()
def archive(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="New folder.")],
    image: Annotated[
        list[str], typer.Option(help="Docker image, such as fedfms:0.1.0; repeatable.")
    ],
    kit: Annotated[
        list[Path], typer.Option(metavar="ZIP", help="A participant's zip; repeatable.")
    ] = [],  # noqa: B006 - typer reads it and does not change it
    checkpoint: Annotated[
        list[Path], typer.Option(metavar="FILE", help="A SAM checkpoint; repeatable.")
    ] = [],  # noqa: B006
    sign: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The --output folder of fedfms provision: its certificate authority signs.",
        ),
    ] = None,
) -> None:
    """Pack image, kits and checkpoints for a site without internet, with a script that loads it."""
    from fedfms.files import file_sha256
    from fedfms.kits.certificates import fingerprint, read_certificate
    from fedfms.kits.checksums import SUMS_FILE
    from fedfms.provisioning.archive import ROOT_FILE
    from fedfms.provisioning.archive import archive as pack

    read = 0

    def on_bytes(count: int) -> None:
        nonlocal read
        read += count
        status.update(f"packing: {read / 1e6:.0f} MB of images")

    with err.status("packing") as status:
        pack(output, image, kit, checkpoint, on_bytes, sign)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    out.print(f"{output}: {size / 1e6:.0f} MB; at the site: sh load.sh")
    told = file_sha256(output / SUMS_FILE)
    out.print(f"tell the site, by another way, the SHA-256 of {SUMS_FILE}:")
    out.print(f"  {told}")
    out.print(f"  which it gives to the script: sh load.sh {told}")
    if sign is not None:
        signer = fingerprint(read_certificate(output / ROOT_FILE))
        out.print(f"or, if it knows it already, the fingerprint of who signed: {signer}")


def _show(made: Provisioned) -> None:
    from fedfms.provisioning.project import ZIPS

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("participant", "type", "kit", "certificate until"):
        table.add_column(heading)
    for kit in made.kits:
        table.add_row(
            kit.participant.name,
            "site" if kit.participant.type == "client" else kit.participant.type,
            kit.state if kit.zip else f"{kit.state}, no zip",
            f"{kit.valid_until:%Y-%m-%d}" if kit.valid_until else "–",
        )
    out.print(WholeWords(table))
    zips = made.output / ZIPS
    out.print(f"{zips}/PARTICIPANT.zip: send each to its participant alone")
    out.print(f"certificate authority {made.fingerprint}")
    for note in made.notes:
        err.print(styled(("note:", "bold yellow"), " ", note))
