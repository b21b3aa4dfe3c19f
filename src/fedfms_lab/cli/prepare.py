"""`fedfms prepare`: from the download of a public data set to sites."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fedfms.cli.common import AsJson, names_in, out, progress, styled
from fedfms.errors import ConfigError
from fedfms_lab.cli import PANEL

commands = typer.Typer()
data_sets = typer.Typer(
    no_args_is_help=True,
    help="Make sites of a public data set: the paper's five, or a Decathlon's.",
)
commands.add_typer(data_sets, name="prepare", rich_help_panel=PANEL)

SourceFolder = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE", help="The download: the folder it was unpacked to, a .zip or a .tar."
    ),
]
Output = Annotated[
    Path, typer.Argument(metavar="OUTPUT", help="Gets one folder for each site; outside SOURCE.")
]
Paper = Annotated[
    bool, typer.Option("--paper", help="site.yml with the paper's choices; see docs/data.md.")
]
Only = Annotated[
    str | None, typer.Option("--only", help="Prepare these sites alone, such as HK,UCL.")
]


Plan = Callable[..., Any]  # of the download, and whether as the paper, to a list of SitePlan


def _data_set(plan_of: Callable[..., Plan]) -> Callable[..., None]:
    """A command that makes what the plan says, and tells what came out."""

    @data_sets.command()
    @functools.wraps(plan_of)
    def command(source: Path, output: Path, as_json: bool, paper: bool, **own: Any) -> None:
        from fedfms_lab.prepare.source import open_source
        from fedfms_lab.prepare.write import UNFINISHED, prepare, tidy

        plan = plan_of(source, output, paper=paper, **own)
        scratch = output / UNFINISHED
        try:
            with progress(as_json) as on_progress, open_source(source, scratch) as download:
                sites = prepare(plan(download, paper=paper), download, output, on_progress)
        finally:
            tidy(output)
        if as_json:
            out.print_json(json.dumps([dataclasses.asdict(site) for site in sites]))
            return
        for site in sites:
            out.print(
                styled(
                    (site.name, "bold"),
                    f": {site.cases} cases, {site.slices} slices, "
                    f"{site.slices_with_foreground} of them with foreground"
                    + (", unchanged" if site.state == "unchanged" else ""),
                )
            )
            for notice in site.notices:
                out.print(styled("  ", ("note:", "yellow"), " ", notice))
        if all(site.state == "unchanged" for site in sites):
            out.print(f"nothing to do: all {len(sites)} sites are in {output} already")
        else:
            out.print(f"next: fedfms check-data {output / sites[0].name / 'site.yml'}")
        if paper and plan_of.__name__ != "decathlon":  # which is none of the paper's
            order = ",".join(site.name for site in sites)
            out.print(f"for the paper's recipes: --set site_order={order}")

    return command


@_data_set
def prostate(
    source: SourceFolder,
    output: Output,
    paper: Paper = False,
    only: Only = None,
    as_json: AsJson = False,
) -> Plan:
    """Prostate MRI of six sites: Multi-site Dataset for Prostate MRI Segmentation (SAML)."""
    from fedfms_lab.prepare.prostate import plan_prostate

    return functools.partial(plan_prostate, only=names_in(only))


@_data_set
def fundus(
    source: SourceFolder,
    output: Output,
    paper: Paper = False,
    od_mode: Annotated[
        str | None,
        typer.Option(
            "--od-mode",
            help="full: the whole optic disc; ring: without the cup, as the paper. "
            "Default: full, and ring with --paper.",
        ),
    ] = None,
    only: Only = None,
    as_json: AsJson = False,
) -> Plan:
    """Optic disc and cup at four sites: REFUGE, ORIGA, G1020 and Drishti-GS1."""
    from fedfms_lab.prepare.fundus import plan_fundus

    return functools.partial(plan_fundus, od_mode=od_mode, only=names_in(only))


@_data_set
def nuclei(
    source: SourceFolder,
    output: Output,
    paper: Paper = False,
    only: Only = None,
    as_json: AsJson = False,
) -> Plan:
    """Nuclei in histology at seven sites: PanNuke, MoNuSAC2020, TNBC and MoNuSeg 2018."""
    from fedfms_lab.prepare.nuclei import plan_nuclei

    return functools.partial(plan_nuclei, only=names_in(only))


@_data_set
def fets(
    source: SourceFolder,
    output: Output,
    paper: Paper = False,
    sites: Annotated[
        str, typer.Option("--sites", help="Partitions of partitioning_1.csv.")
    ] = "1,6,18,21",
    modality: Annotated[
        str, typer.Option(help="The MRI contrast: t1ce, flair, t1 or t2.")
    ] = "t1ce",
    as_json: AsJson = False,
) -> Plan:
    """Brain tumours by institution: FeTS 2022, the tumour core."""
    from fedfms_lab.prepare.fets import plan_fets

    return functools.partial(plan_fets, sites=names_in(sites) or (), modality=modality)


@_data_set
def ctlung(
    source: SourceFolder,
    output: Output,
    paper: Paper = False,
    sites_from: Annotated[
        Path | None, typer.Option(help="CSV of patient and site. Otherwise a hash deals to five.")
    ] = None,
    as_json: AsJson = False,
) -> Plan:
    """Lung in CT slices at five sites; the paper does not name its source, see docs/data.md."""
    from fedfms_lab.prepare.ctlung import plan_ctlung

    return functools.partial(plan_ctlung, sites_from=sites_from)


@_data_set
def decathlon(
    source: SourceFolder,
    output: Output,
    paper: Paper = False,
    channel: Annotated[
        int | None, typer.Option(help="Which modality of a task with several, from 0.")
    ] = None,
    sites: Annotated[
        int, typer.Option(help="Number of sites; a hash deals the cases to them.")
    ] = 1,
    sites_from: Annotated[
        Path | None, typer.Option(help="CSV of case and site, in place of --sites.")
    ] = None,
    plane: Annotated[str, typer.Option(help="axial, coronal or sagittal.")] = "axial",
    as_json: AsJson = False,
) -> Plan:
    """Any task of the Medical Segmentation Decathlon."""
    from fedfms_lab.prepare.decathlon import plan_decathlon

    if plane not in ("axial", "coronal", "sagittal"):
        raise ConfigError(f"there is no plane {plane}", "choose axial, coronal or sagittal")
    return functools.partial(
        plan_decathlon, channel=channel, sites=sites, sites_from=sites_from, plane=plane
    )
