"""A kit that `nvflare deploy prepare` turned for Docker, Kubernetes or Slurm.

That command copies a kit, deletes its `local/resources.json` (our list of classes that jobs may
name, no streaming of logs, the guard of registrations) and starts FLARE's own client or server from
it, past everything that `fedfms flare` and `fedfms server` check. So such a kit does not start:
`read_kit` refuses it, and FLARE's own start meets the component that provisioning put into
`local/resources.json.default`, the file that FLARE falls back to (flare/turned.py).
"""

from __future__ import annotations

from pathlib import Path

from fedfms.errors import ConfigError

# what `nvflare deploy prepare` (2.9.0) writes for each runtime, and nothing else does
_TRACES = {
    "startup/start_docker.sh": "Docker",
    "startup/start_slurm.sh": "Slurm",
    "startup/parent.slurm": "Slurm",
    "helm_chart": "Kubernetes",
    "local/study_runtime.yaml": "Docker, Kubernetes or Slurm",  # in a container, all that is left
}


def refuse_turned(kit: Path) -> None:
    """Raise ConfigError (kit-turned) for a kit that `nvflare deploy prepare` wrote."""
    for trace, runtime in _TRACES.items():
        if (kit / trace).exists():
            raise turned(str(kit), runtime)


def turned(kit: str, runtime: str = "Docker, Kubernetes or Slurm") -> ConfigError:
    """What happened to such a kit, and what to do."""
    return ConfigError(
        f"nvflare deploy prepare turned the kit in {kit} for {runtime}, which removes what "
        "protects this participant (its list of allowed classes among it), so it is not started",
        "start the kit as it came from fedfms provision, with fedfms server or fedfms flare",
        code="kit-turned",
    )
