"""Planners that let torch.distributed.checkpoint (DCP) store and read the rectangles of fragments.

The stored tensors are `KIND.NAME`: `model.NAME`, the optimizer's (of AdamW `exp_avg.NAME` and `exp_avg_sq.NAME`) and
`carried.NAME`, of the unsharded shape and in the dtype of the live ones, so the result is a plain DCP checkpoint: any DCP
reader can open it, under any tiling.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, LoadPlan, SavePlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from based_megatron.checkpoint.fragments import Fragment


class FragmentSavePlanner(DefaultSavePlanner):
    """Writes the rectangles of the owned fragments. Of equal rectangles on several ranks DCP writes one."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._fragments = [fragment for fragment in fragments if fragment.owned]
        self._views: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """One write item for each rectangle."""
        items = []
        for fragment in self._fragments:
            for kind in fragment.tensors:
                for index, view in _views(fragment, kind).items():
                    data = TensorWriteData(
                        chunk=_chunk(index, view),
                        properties=TensorProperties(dtype=view.dtype),
                        size=torch.Size(fragment.spec.shape),
                    )
                    items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
                    self._views[index] = view
        assert len(self._views) == len(items), "two fragments of one rank hold the same rectangle"
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The live rectangle to write."""
        return self._views[index]


class FragmentLoadPlanner(DefaultLoadPlanner):
    """Reads rectangles straight into the live tensors of the fragments, however the checkpoint was tiled."""

    def __init__(self, fragments: Iterable[Fragment], kinds: Iterable[str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._fragments = list(fragments)
        self._kinds = frozenset(kinds)
        self._views: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        """One read item for each overlap of a rectangle of ours with one of the checkpoint's."""
        assert self.metadata is not None
        items = []
        for fragment in self._fragments:
            for kind in fragment.tensors.keys() & self._kinds:
                views, name = _views(fragment, kind), stored_name(kind, fragment.spec.name)
                stored = self.metadata.state_dict_metadata[name]
                assert isinstance(stored, TensorStorageMetadata)
                assert not views.keys() & self._views.keys(), f"{name}: two fragments of one rank overlap"
                items += create_read_items_for_chunk_list(name, stored, [_chunk(*item) for item in views.items()])
                self._views.update(views)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The live rectangle to fill."""
        return self._views[index]


def stored_name(kind: str, name: str) -> str:
    """Name inside the checkpoint of one kind of tensor: model, carried or a state of the optimizer."""
    return f"{kind}.{name}"


def _views(fragment: Fragment, kind: str) -> dict[MetadataIndex, Tensor]:
    name = stored_name(kind, fragment.spec.name)
    return {
        MetadataIndex(name, torch.Size(rectangle.global_offset)): rectangle.view(fragment.tensors[kind])
        for rectangle in fragment.rectangles()
    }


def _chunk(index: MetadataIndex, view: Tensor) -> ChunkStorageMetadata:
    assert index.offset is not None
    return ChunkStorageMetadata(offsets=index.offset, sizes=view.shape)
