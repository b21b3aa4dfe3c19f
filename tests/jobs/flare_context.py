"""FLARE's own context and workspace around one component, without a server or a site."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContextManager
from nvflare.apis.workspace import Workspace

JOB_ID = "0b1f3b9e-7a52-4a7d-9d34-7c2f4f1f9a10"


class Engine:
    """What components ask of FLARE's engine: workspace, other components, events."""

    def __init__(self, folder: Path, site: str, components: dict[str, Any]) -> None:
        for name in ("startup", "local"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.workspace = Workspace(str(folder), site, config_folder="config")
        self.components = components
        self.panics: list[str] = []
        self.contexts = FLContextManager(
            engine=self, identity_name=site, job_id=JOB_ID, public_stickers={}, private_stickers={}
        )

    def get_workspace(self) -> Workspace:
        return self.workspace

    def get_component(self, name: str) -> Any:
        return self.components[name]

    def get_clients(self) -> list[Any]:
        return [SimpleNamespace(name="site-1"), SimpleNamespace(name="site-2")]

    def register_aux_message_handler(self, topic: str, handler: Any) -> None:
        """Nobody sends one here."""

    def fire_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type == EventType.FATAL_SYSTEM_ERROR:
            self.panics.append(fl_ctx.get_prop(FLContextKey.EVENT_DATA))
        for component in self.components.values():
            component.handle_event(event_type, fl_ctx)

    def new_context(self) -> Any:
        fl_ctx = self.contexts.new_context()
        fl_ctx.set_prop(ReservedKey.ENGINE, self, private=True)
        return fl_ctx

    def config_folder(self) -> Path:
        folder = Path(self.workspace.get_app_config_dir(JOB_ID))
        folder.mkdir(parents=True, exist_ok=True)
        return folder
