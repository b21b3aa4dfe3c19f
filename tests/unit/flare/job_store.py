"""FLARE's store and job manager, as a server has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import SystemComponents
from nvflare.apis.fl_context import FLContextManager
from nvflare.apis.server_engine_spec import ServerEngineSpec
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage

from fedfms.flare.keeper import RunJobManager


class Engine(ServerEngineSpec):  # type: ignore[misc]
    """FLARE's store and job manager, without a server around them."""

    def __init__(self, folder: Path) -> None:
        self.manager = RunJobManager(str(folder / "storage" / "jobs"))
        self.store = FilesystemStorage(str(folder.anchor))
        self.contexts = FLContextManager(self, "server", "", {}, {})

    def get_component(self, component_id: str) -> Any:
        known = {"job_store": self.store, SystemComponents.JOB_MANAGER: self.manager}
        return known.get(component_id)

    def new_context(self) -> Any:
        return self.contexts.new_context()


Engine.__abstractmethods__ = frozenset()
