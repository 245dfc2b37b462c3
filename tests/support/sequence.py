"""Slices of sequences for tests: documents that matter, ranks as threads, and the whole sequence as the oracle."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from based_megatron.parallel.sequence.carried import CarriedState
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.in_process import in_process_ranks, run_ranks
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.ranks import Algorithm, ContextRanks
from based_megatron.parallel.sequence.states import STATE

CPU = torch.device("cpu")


def seeded(*shape: int, seed: int) -> Tensor:
    """Normal numbers in fp64, the same on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def telling_documents(bounds: tuple[int, ...]) -> Tensor:
    """Ids [B, S] with the starts that matter for these slices; each row is another case."""
    total, inner = bounds[-1], list(bounds[1:-1])
    second, last = bounds[1], bounds[-2]
    starts: list[list[int]] = [
        [],  # one document over all slices
        [second],  # on the boundary of the second slice
        [second - 1],  # the last token of the first slice
        [second + 1],  # the second token of the second slice
        inner,  # every slice its own document
        [(last + total) // 2, total - 1],  # two in the last slice
        [second // 2],  # inside the first slice
        [total // 2, total // 2 + 1],  # a document of one token, within a middle slice if there is one
        list(range(1, total)),  # every token its own document
        [last - 1, total - 1],
    ]
    ids = torch.zeros(len(starts), total, dtype=torch.int32)
    for row, places in enumerate(starts):
        for place in places:
            if 0 < place < total:
                ids[row, place:] += 1
    return ids


def documents_of_part(ids_BS: Tensor, begin: int, end: int) -> Documents:
    """Documents of the step that has these tokens of long sequences, which goes on with what came before."""
    before_B = (ids_BS[:, :begin] == ids_BS[:, begin, None]).sum(1)
    return Documents(Documents.from_ids(ids_BS[:, begin:end]).starts, tuple(before_B.tolist()))


def spoil_what_has_ended(carried: CarriedState, documents: Documents) -> int:
    """Put NaN, in place, into all of the carried state that no document goes on with. Returns how many tensors got any."""
    before_B = torch.tensor(documents.tokens_before)
    spoiled = 0
    for (kind, _), x in carried.before.items():
        if kind == STATE:
            ended = before_B == 0
        else:
            ended = torch.arange(x.shape[1], 0, -1) > before_B[:, None]
        x[ended] = float("nan")
        spoiled += bool(ended.any())
    return spoiled


def plan_for(ranks: ContextRanks, bounds: tuple[int, ...], ids_BS: Tensor | None, **options: Any) -> SequencePlan:
    """The plan of one rank, from the ids of the whole sequences or None."""
    documents = None if ids_BS is None else Documents.from_ids(ids_BS)
    return SequencePlan(ranks, bounds, documents, options.pop("device", CPU), **options)


def flows(ids_S: Tensor, bounds: tuple[int, ...], earlier: int, later: int) -> bool:
    """Whether one document runs from the last token of one slice to the first of a later one."""
    return earlier < later and len(set(ids_S[bounds[earlier + 1] - 1 : bounds[later] + 1].tolist())) == 1


def on_threads(
    size: int,
    program: Callable[[ContextRanks], Any],
    algorithm: Algorithm = "auto",
    node_ranks: int = 0,
) -> list[Any]:
    """program(ranks) for every rank, each in a thread; results in rank order."""
    places = in_process_ranks(size, algorithm, node_ranks)
    return run_ranks(size, lambda rank: program(places[rank]))


def gap(found: Tensor | None, expected: Tensor | None) -> float:
    """Largest difference; shapes must agree."""
    assert found is not None and expected is not None and found.shape == expected.shape, (found, expected)
    return float((found - expected).detach().abs().max()) if found.numel() else 0.0
