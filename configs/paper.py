"""The paper's models: 4 sizes x 7 variants x (uniform and 9 hybrids), MHA or GQA.

    deconstruct prepare --input=SlimPajama/ --tokenizer=pythia.json --output=prepared/slimpajama
    deconstruct train --config=configs/paper.py:size=500m,variant=non_approximate,layout=even \\
        --workdir=runs/500m_even --config.data=prepared/slimpajama

Defaults: size=500m, variant=standard, layout=even (uniform for standard), heads=mha. A list of layers is written with
+ instead of a comma: layout=1+5+9. Options of a form stand in parentheses: variant=hidden/window(size=256).
mesh=v5e (v5p, v6e, tpu7x, h100, h200) splits parameters as suits that accelerator; the default fits any.
Settings: arXiv:2510.11602, section 4 (15 B tokens, 45 B for 1.7b; one MI300X).
Expected at 500m after 15 B tokens, WikiText perplexity: standard 38.1; even hybrids 38.5 to 39.4, mlp 45.8.
"""

from deconstruct.config import default_config
from deconstruct.spelling import parse_argument, split_list

SIZES = {
    "70m": {"hidden_size": 512, "intermediate_size": 2048, "num_layers": 6, "num_heads": 8},
    "160m": {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 12, "num_heads": 12},
    "500m": {"hidden_size": 896, "intermediate_size": 4864, "num_layers": 24, "num_heads": 14},
    "1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_layers": 28,
        "num_heads": 16,
        "block": "qwen3",
    },
}
# Over how many neighbours parameters are split; the rest of the devices copy them. The default mesh splits them as far
# as it can, which always has room and sends the smallest pieces around; these split no further than memory asks for.
MESHES = {
    "v5e": {"data": -1, "fsdp": 16},  # 16 GB a chip: a row of a 16 x 16 torus
    "v6e": {"data": -1, "fsdp": 16},  # 32 GB
    "v5p": {"data": -1, "fsdp": 8},  # 95 GB
    "tpu7x": {"data": -1, "fsdp": 8},  # 96 GB a device, of which a chip has two
    "h100": {"data": -1, "fsdp": 8},  # 80 GB: the GPUs of a node
    "h200": {"data": -1, "fsdp": 8},  # 141 GB
}
GQA_KV_HEADS = {"70m": 2, "160m": 2, "500m": 2, "1.7b": 8}  # 500m and 1.7b: as Qwen2.5-0.5B and Qwen3-1.7B have it


def get_config(argument=None):
    chosen = parse_argument(argument, {"size": "500m", "variant": "standard", "layout": "", "heads": "mha", "mesh": ""})
    size, heads, mesh = chosen["size"], chosen["heads"], chosen["mesh"]
    if size not in SIZES:
        raise ValueError(f"size={size}: expected one of {', '.join(SIZES)}")
    if heads not in ("mha", "gqa"):
        raise ValueError(f"heads={heads}: expected mha or gqa")
    if mesh and mesh not in MESHES:
        raise ValueError(f"mesh={mesh}: expected one of {', '.join(MESHES)}")

    config = default_config()
    config.variant = chosen["variant"]
    config.layout = ",".join(split_list(chosen["layout"], "+")) or (
        "uniform" if chosen["variant"] == "standard" else "even"
    )
    config.model.update(SIZES[size])
    config.mesh.update(MESHES.get(mesh, {}))
    config.model.num_kv_heads = GQA_KV_HEADS[size] if heads == "gqa" else 0
    if size == "1.7b":
        config.steps = 85_831
        config.learning_rate = 3e-4
    return config
