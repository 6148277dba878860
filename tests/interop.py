"""What PEFT, transformers and llama.cpp make of adapters, run by a Python that has them (`scripts/setup interop`).

It reads tasks from standard input, a line each, and says `done` after each one:

    peft DIRECTORY     models and adapters by PEFT, and the logits it gives with them
    loaded DIRECTORY   logits of PEFT with the adapters that slowft wrote
    llama JOB.json     log-probabilities of llama.cpp with adapters in GGUF

It imports nothing of slowft's, so that what it says is independent.
"""

import json
import sys
import warnings
from pathlib import Path

VOCAB = 96
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOKENS = [(7 * i + 3) % VOCAB for i in range(24)]

# name -> (model, arguments of LoraConfig)
CASES = {
    "llama-lora": ("llama", {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama-dora": ("llama", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": "all-linear"}),
    "qwen2-lora": ("qwen2", {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": r".*\.(k_proj|up_proj)"}),
    "qwen2-dora": ("qwen2", {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "o_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "o_proj", "gate_proj"],
            "layers_to_transform": [0, 2],
            "rank_pattern": {"o_proj": 7, r"layers\.2\.mlp\.gate_proj": 2},
            "alpha_pattern": {"gate_proj": 3, r".*layers\.0\.self_attn\.q_proj": 21},
        },
    ),
    "embedding": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
}


def model_of(kind: str):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    return made[1](made[0](**SIZES)).eval()


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].float().contiguous()


def by_peft(directory: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    logits = {}
    for name, (kind, arguments) in CASES.items():
        model = model_of(kind)
        if not (directory / kind).exists():
            model.save_pretrained(directory / kind)
            config = json.loads((directory / kind / "config.json").read_text())
            config["rope_theta"] = 10_000.0  # where mlx-lm looks for it
            (directory / kind / "config.json").write_text(json.dumps(config))
            logits[kind] = logits_of(model)
        model = get_peft_model(model, LoraConfig(**arguments)).eval()
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data += torch.randn_like(parameter) * 0.1
        model.save_pretrained(directory / name)
        logits[name] = logits_of(model)
    save_file(logits, directory / "logits.safetensors")


def by_peft_with_ours(directory: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file

    logits = {}
    for adapter in sorted((directory / "ours").iterdir()):
        model = PeftModel.from_pretrained(model_of(CASES[adapter.name][0]), str(adapter))
        logits[adapter.name] = logits_of(model.eval())
    save_file(logits, directory / "loaded.safetensors")


def by_llama_cpp(file: Path) -> None:
    """Of each run (model, adapter or None) the log-probability of every token after the prompt, by its id."""
    import xllamacpp as xlc

    job, found = json.loads(file.read_text()), []
    for model, adapter in job["runs"]:
        params = xlc.CommonParams()
        params.model.path = model
        params.n_ctx, params.warmup, params.cpuparams.n_threads = 64, False, 1
        params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            params.lora_adapters = [xlc.CommonAdapterLoraInfo(adapter, 1.0)]
        server = xlc.Server(params)
        asked = {"prompt": job["tokens"], "max_tokens": 1, "logprobs": job["vocab"], "temperature": 0.0}
        answer = server.handle_completions(asked)
        (first,) = answer["choices"][0]["logprobs"]["content"]
        found.append({entry["id"]: entry["logprob"] for entry in first["top_logprobs"]})
        del server
    Path(job["output"]).write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        task, path = line.split(maxsplit=1)
        {"peft": by_peft, "loaded": by_peft_with_ours, "llama": by_llama_cpp}[task](Path(path.strip()))
        print("done", flush=True)
