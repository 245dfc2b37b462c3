"""Compiling and exporting an export. Each function is one use: its docstring says in the table what was tried."""

from pathlib import Path

import torch
from opened import CLOSE, logits_of, model_of, some_ids


def compiled(export: Path, tmp: Path) -> None:
    """torch.compile, and compile of a whole graph with a mask: logits of the eager model"""
    model, ids = model_of(export), some_ids()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for options, inputs in (({}, {}), ({"fullgraph": True}, {"attention_mask": mask})):
        graph = torch.compile(model, backend="aot_eager", **options)
        torch.testing.assert_close(logits_of(graph, ids, **inputs), logits_of(model, ids, **inputs), **CLOSE)
        torch.compiler.reset()


def compiled_training(export: Path, tmp: Path) -> None:
    """gradients of a compiled model: those of the eager one"""
    model, ids = model_of(export).train(), some_ids()
    found = []
    for one in (torch.compile(model, backend="aot_eager"), model):
        model.zero_grad()
        one(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], **CLOSE)


def exported(export: Path, tmp: Path) -> None:
    """torch.export with a mask, saved and loaded, run on other tokens"""
    model, ids = model_of(export), some_ids()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    program = torch.export.export(model, (ids,), {"attention_mask": mask, "use_cache": False}, strict=False)
    torch.export.save(program, tmp / "model.pt2")
    other = some_ids(seed=7)
    found = torch.export.load(tmp / "model.pt2").module()(other, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found, logits_of(model, other, attention_mask=mask), **CLOSE)


USES = (compiled, compiled_training, exported)
