"""Train a small model from Python: make a corpus, prepare it, train, and continue a prompt. Two minutes on a laptop CPU.

Run it as `python examples/train_from_python.py runs/example`.
"""

import json
import sys
from pathlib import Path

from based_megatron.config import Config, parse_config
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare
from based_megatron.inference.decoder import Placement, load_decoder
from based_megatron.inference.sampling import Sampling
from based_megatron.inference.text import TextRequest
from based_megatron.train.train import train


def write_corpus(path: Path) -> None:
    """Sums in words, one document a line: any JSON lines with a `text` will do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (f"{a} plus {b} is {a + b}. " * 4 for a in range(40) for b in range(40))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def main(folder: Path, *overrides: str) -> None:
    """Write everything below `folder`. Overrides are those of `based train`, such as `--train.steps 500`."""
    write_corpus(folder / "sums.jsonl")
    prepare(PrepConfig(inputs=(str(folder / "sums.jsonl"),), output=str(folder / "data"), vocab_size=400))
    config: Config = parse_config(
        ["--config", "tiny", "--run-dir", str(folder / "run"), "--data.path", str(folder / "data"), *overrides]
    )
    train(config)  # on this rank; `based launch` or torchrun starts more of them
    decoder = load_decoder(folder / "run", Placement(device="cpu"))
    for update in decoder.run([TextRequest("3 plus 4 is", Sampling(max_new_tokens=8))]):
        print(update.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
