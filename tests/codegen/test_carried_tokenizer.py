"""The tokenizer library that bundles carry is older than the compiler's: both read the same files in the same way."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from compiler.checkpoint import gguf_tokenizer
from compiler.codegen import carried
from runtime import device
from tests.checkpoint.test_gguf_tokenizer import SPM, TEXTS, as_metadata, trained

REPO = Path(__file__).parents[2]
MODELS = ("storyteller-5m-gptq-4bit-g128", "stories260k")
# argv: texts, files; a line of JSON for each file: ids of every text, and the text that they give.
ASK = """
import json, sys
import tokenizers
for path in sys.argv[2:]:
    made = tokenizers.Tokenizer.from_file(path)
    ids = [made.encode(text).ids for text in json.loads(sys.argv[1])]
    print(json.dumps([ids, [made.decode(each) for each in ids]]))
"""


def test_two_versions_agree(tmp_path: Path) -> None:
    """Every split of words that quern writes for GGUF files, SentencePiece, and two tokenizer.json of transformers."""
    (part,) = (part for part in carried.PARTS[device.arch()] if part.name.startswith("tokenizers"))
    assert part.requirement == "tokenizers==0.22.2"
    (tmp_path / part.name).write_bytes(carried.fetch(device.arch())[part.name])
    byte_level = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    metadata = {pre: as_metadata(byte_level, pre) for pre in gguf_tokenizer.SPLITS} | {"spm": SPM}
    files = [REPO / "tests" / "models" / name / "tokenizer.json" for name in MODELS]
    for name, made in metadata.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_bytes(gguf_tokenizer.files(made, "FILE")["tokenizer.json"])
    command = [sys.executable, "-S", "-c", ASK, json.dumps(TEXTS), *map(str, files)]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    answers = dict(zip(files, map(json.loads, done.stdout.splitlines()), strict=True))
    for path, (ids, texts) in answers.items():
        ours = Tokenizer.from_file(str(path))
        assert [ours.encode(text).ids for text in TEXTS] == ids, path.name
        assert [ours.decode(each) for each in ids] == texts, path.name
    assert len({json.dumps(ids) for ids, _ in answers.values()}) > 4  # they do not all split alike
