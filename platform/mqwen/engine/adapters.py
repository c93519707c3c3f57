"""LoRA adapters beside one set of weights: each row of a batch has one of them, or none.

All adapters of a layer are one low-rank product; a mask lets each row have its own adapter's part (as in Punica, Chen
et al. 2023, arXiv:2310.18547, without a kernel of its own). Shapes: T rows of a batch, R ranks of all adapters of a
layer together.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel
    from mqwen.model.adapters import AdapterWeights


class Adapters:
    """Hooks on the model's linear layers, which do nothing while no row asks for an adapter.

    numbers: of the adapters, from 1, by name; 0 is none. Raises ValueError for an empty name.
    """

    def __init__(self, model: "MQWenLMHeadModel", folders: Mapping[str, str | Path]) -> None:
        if "" in folders:
            raise ValueError(f"the adapter {folders['']} has an empty name; requests ask for adapters by name")
        self._model = model
        self.numbers = {name: number for number, name in enumerate(folders, 1)}
        self._rows: Tensor | None = None
        self._projectors: dict[str, nn.Module] = {}
        self._visual: set[str] = set()  # adapters to which pictures look different
        if folders:
            from mqwen.model.adapters import read_adapter  # brings peft

            self._install({name: read_adapter(model, folder) for name, folder in folders.items()})

    def _install(self, loaded: "dict[str, AdapterWeights]") -> None:
        self._projectors = {name: one.projector for name, one in loaded.items() if one.projector is not None}
        self._visual = {name for name, one in loaded.items() if one.projector is not None or one.changes_tower}
        for layer in {layer for one in loaded.values() for layer in one.layers}:
            module = self._model.get_submodule(layer)
            assert isinstance(module, nn.Linear)
            pairs = [(self.numbers[name], *one.layers[layer]) for name, one in loaded.items() if layer in one.layers]
            owners = torch.cat([torch.full((len(down),), number) for number, down, _ in pairs])
            down = torch.cat([down for _, down, _ in pairs])
            up = torch.cat([up for _, _, up in pairs], dim=1)
            module.register_forward_hook(self._hook(owners.to(module.weight.device), down, up))

    def _hook(self, owners: Tensor, down: Tensor, up: Tensor) -> Any:
        """owners: (R,), the adapter of each rank. down: (R, in). up: (out, R)."""

        def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            if self._rows is None:
                return None
            return output + F.linear(F.linear(inputs[0], down) * (self._rows == owners), up)

        return add

    @contextmanager
    def for_rows(self, rows: Tensor | None) -> Iterator[None]:
        """rows: (T,), the number of each row's adapter; None where none has any."""
        self._rows = None if rows is None else rows.unsqueeze(1)
        try:
            yield
        finally:
            self._rows = None

    def change_pictures(self, name: str | None) -> bool:
        """Whether pictures look different to this adapter: it brings a projector, or layers of the tower."""
        return name is not None and name in self._visual

    @contextmanager
    def for_pictures(self, name: str | None) -> Iterator[None]:
        """All rows are this adapter's, and the projector is its own where it has one."""
        own = self._model.feature_proj
        if name is not None:
            self._model.feature_proj = self._projectors.get(name, own)  # type: ignore[assignment]
            self._rows = torch.full((1,), self.numbers[name], device=self._model.device)
        try:
            yield
        finally:
            self._model.feature_proj, self._rows = own, None
