"""Settings of `based prep`. The docstring under a field is its `--help` text."""

from dataclasses import dataclass
from typing import Literal

import tyro

TEXT_SUFFIXES = (
    ".txt .md .rst .tex .py .pyi .c .h .cc .cpp .hpp .cu .cuh .rs .go .java .kt .scala .js .ts .jsx .tsx .sh .sql "
    ".lua .rb .php .pl .r .jl .hs .ml .swift .cs .f90 .lean"
)


@dataclass(frozen=True)
class PrepConfig:
    """Turn text into tokenized webdataset shards with a manifest, ready for `based train --data.path OUTPUT`."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files (.txt, .jsonl, .ndjson, .json, sources, each also as .gz, .zst, .bz2 or .xz, and .parquet), and folders, searched for
    all of these, behind links too. Each file is read once. - is standard input: JSON lines or text."""
    output: str
    """Folder to write: tokenizer.json, train/, validation/ and manifest.json."""
    tokenizer: str = "train"
    """`train` for a new byte-level BPE, or a path: a Hugging Face tokenizer.json, its folder, or a folder with the
    vocab.json and merges.txt of GPT-2."""
    vocab_size: int = 8192
    """Entries of a trained tokenizer, that of --eos-token included."""
    train_tokenizer_bytes: int = 256 * 2**20
    """Text to train the tokenizer on, from the start of the shuffled list of files; less text needs less memory."""
    eos_token: str = ""
    """Token that ends every document; by default the one that the tokenizer names, or <|endoftext|>, also of a trained one."""
    text_key: str = "text"
    """Key of the text in JSON, and name of its column in .parquet files; `a.b` is `b` in the object `a`."""
    separator: str | None = None
    """A line that separates the documents of a .txt file ('' is a blank line); by default a file is one document."""
    suffixes: tuple[str, ...] = tuple(TEXT_SUFFIXES.split())
    """Endings of plain text files; each file is one document. What is given replaces the list; endings with a + (+.log) are
    added to it."""
    validation_fraction: float = 0.01
    """Part of the documents to hold out. The side of a document follows from a hash of its text: it never changes, and
    copies stay together."""
    deduplicate: bool = False
    """Leave out documents whose text is in the corpus already, and count them. Which of the copies stays follows from the order."""
    seed: int = 42
    """Seed of the order of documents. The order follows from it and from the files and records that they come from: documents of
    files that are added later come in between."""
    tasks: int = 0
    """Processes to tokenize and write with, each with less than 1 GB of memory; 0 is one a core. The output is the same for any number."""
    unit_bytes: int = 64 * 10**6
    """Input that is tokenized at a time, and is finished whole or not at all. The output is the same for any size."""
    executor: Literal["local", "datatrove", "slurm", "ray"] = "local"
    """What starts the tasks. The others are datatrove's (the extra `prep`): processes of this machine, an array of SLURM jobs, a Ray
    cluster. All nodes must see the inputs and the output. With slurm the command submits a job and returns; based launch slurm
    --after can wait for it."""
    slurm_time: str = "24:00:00"
    """Time limit of the job and of its tasks, in a form that sbatch takes. What is left then is for the next start."""
    slurm_partition: str = ""
    """Partition to use, if not the cluster's default."""
    slurm_memory_gb: int = 2
    """Memory of each task."""
    slurm_options: tuple[str, ...] = ()
    """More options of sbatch for the job and its tasks, as account=x."""
    keep_units: bool = True
    """Keep the tokenized units in OUTPUT.units, about the size of the corpus, when it is complete: with --overwrite and more
    inputs, only what is new is tokenized. They are always kept when the work ends early, for the next start to go on."""
    block_tokens: int = 4 * 2**20
    """Tokens of one sample of a shard."""
    shard_blocks: int = 64
    """Samples of one shard file."""
    max_skipped: int | None = None
    """Most documents, lines and files that may be left out because they cannot be read; one more ends the run, and nothing is kept.
    Empty ones are not counted. By default any number is left out, named and counted."""
    strict: bool = False
    """Leave nothing out: the same as --max-skipped 0."""
    overwrite: bool = False
    """Replace an output folder of an earlier `based prep`."""
