"""A GGUF file gives what the folder gives that it was made from."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from flashserve.config import EngineConfig
from flashserve.errors import ConfigError
from flashserve.layers.weight_format import WEIGHT_FORMATS
from flashserve.models.gguf.block_types import BLOCK_TYPES
from flashserve.models.gguf.dequantize import PLAIN, dequantize
from flashserve.models.registry import open_model
from gguf_writer import FAMILIES, gguf, write_model
from tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def open_file(path, **settings):
    return open_model(EngineConfig(str(path), **settings))


# What a Gemma's file does not say is the same in all of them.
AS_ALL_GEMMAS = {
    "num_hidden_layers": 6,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    "query_pre_attn_scalar": 16,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_folder(family, tmp_path, drive, random_prompts):
    folder = make_tiny_model(family, tmp_path / "folder", **(AS_ALL_GEMMAS if family == "gemma3" else {}))
    file = write_model(folder, tmp_path / "model.gguf")
    prompts = random_prompts((3, 20, 70))
    expected = drive(folder, dtype="float32").generate(prompts, 8)
    assert drive(file, dtype="float32").generate(prompts, 8) == expected


def test_biases_of_queries_and_keys_are_put_in_order_too(tmp_path, drive, random_prompts):
    folder = make_tiny_model("llama", tmp_path / "folder", attention_bias=True, mlp_bias=True)
    file = write_model(folder, tmp_path / "model.gguf")
    prompts = random_prompts((5, 30))
    assert drive(file, dtype="float32").generate(prompts, 8) == drive(folder, dtype="float32").generate(prompts, 8)


def test_a_tensor_of_factors_is_llama_3s_scaling(tmp_path, drive, random_prompts):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**scaling, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    folder = make_tiny_model("llama", tmp_path / "folder", rope_parameters=rope)
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    waves = 2 * np.pi / plain
    smooth = np.clip((64 / waves - 1) / 3, 0, 1)
    factors = 1 / ((1 - smooth) / 8 + smooth)
    file = write_model(folder, tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors.astype(np.float32)})
    assert open_file(file).config["rope_parameters"]["factors"] == pytest.approx(factors.tolist(), rel=1e-6)
    prompts = random_prompts((5, 90))
    assert drive(file, dtype="float32").generate(prompts, 8) == drive(folder, dtype="float32").generate(prompts, 8)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"ARCH.rope.scaling.type": "linear", "ARCH.rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"ARCH.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "ARCH.rope.scaling.type": "yarn",
                "ARCH.rope.scaling.factor": 4.0,
                "ARCH.rope.scaling.original_context_length": 512,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        ),
    ],
)
def test_scalings_of_the_context_are_read(llama, tmp_path, extra, expected):
    rope = open_file(write_model(llama, tmp_path / "model.gguf", extra=extra)).config["rope_parameters"]
    assert rope == {"rope_theta": 10000.0, **expected}


@pytest.mark.parametrize("number", [number for number in BLOCK_TYPES if number not in PLAIN])
def test_blocks_are_the_numbers_that_the_formats_own_library_makes_of_them(number):
    kind = BLOCK_TYPES[number]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.elements, kind.num_bytes)
    rng = np.random.default_rng(number)
    data = rng.integers(0, 256, (6, 2 * kind.num_bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore"):  # some scales are no numbers
        finite = np.isfinite(gguf.quants.dequantize(data, number)).all(1, keepdims=True)
    data = np.where(finite, data, 0)
    expected = torch.from_numpy(gguf.quants.dequantize(data, number))
    found = dequantize(torch.from_numpy(data), number)
    assert found.abs().max() > 0
    # The order of the products' factors is free; all else is exact.
    torch.testing.assert_close(found, expected, rtol=2**-22, atol=0)


def test_blocks_are_given_as_they_are_and_in_the_models_order(llama, tmp_path):
    file = write_model(llama, tmp_path / "model.gguf", quantize={"attn_": "Q4_1", "ffn_": "Q8_0"})
    files = open_file(file)
    weights = files.weights(torch.float32, torch.device("cpu"), None, WEIGHT_FORMATS[None])
    for name, kind in (("self_attn.q_proj", "Q4_1"), ("self_attn.v_proj", "Q4_1"), ("mlp.down_proj", "Q8_0")):
        name = f"model.layers.1.{name}.weight"
        shape = files._tensors[name].shape
        found = weights.grouped(name, shape)
        assert (found.type.block.name, found.shape) == (kind, shape)
        assert torch.equal(found.rows(0, shape[0]).dequantize(), weights.read(name, shape))
    assert weights.grouped("model.norm.weight", (64,)) is None


def test_a_split_model_is_one_model(llama, tmp_path, drive, random_prompts):
    whole = write_model(llama, tmp_path / "model.gguf")
    parts = split(whole, tmp_path, 3)
    prompts = random_prompts((3, 20))
    expected = drive(llama, dtype="float32").generate(prompts, 8)
    for part in (parts[0], parts[2], tmp_path / "parts"):  # any of them, or the folder
        assert drive(part, dtype="float32").generate(prompts, 8) == expected


def split(whole, folder, count):
    """As llama-gguf-split does: the first file has the metadata, each says which one it is."""
    reader = gguf.GGUFReader(whole)
    (folder / "parts").mkdir()
    parts = [folder / "parts" / f"model-{part + 1:05d}-of-{count:05d}.gguf" for part in range(count)]
    for part, path in enumerate(parts):
        writer = gguf.GGUFWriter(path, "llama")
        for field in reader.fields.values() if part == 0 else ():
            if field.name.startswith(("GGUF.", "general.architecture")):
                continue
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[part::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def test_fingerprints_tell_tunings_apart_and_not_names(llama, tmp_path):
    one = write_model(llama, tmp_path / "one.gguf")
    same = tmp_path / "same.gguf"
    same.write_bytes(one.read_bytes())
    other = write_model(make_tiny_model("llama", tmp_path / "other", seed=1), tmp_path / "other.gguf")
    prints = [open_file(file).fingerprint("bfloat16", "x") for file in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert open_file(one).fingerprint("float32", "x") != prints[0] != open_file(one).fingerprint("bfloat16", "y")


def test_what_a_file_says_of_sampling_and_ends_is_used(llama, tmp_path):
    extra = {
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.eom_token_id": 5,
    }
    files = open_file(write_model(llama, tmp_path / "model.gguf", extra=extra))
    assert files.card.generation_config == {"temperature": 0.5, "top_k": 20}
    assert set(files.end_token_ids(512)) == {0, 2, 5}
    assert files.card.tokenizer_config["eos_token"] == "<|endoftext|>"
    assert "<|im_start|>" in files.card.tokenizer_config["chat_template"]["default"]


def test_zeros_of_sampling_mean_what_they_do_in_llama_cpp(llama, tmp_path):
    names = {"temp": 0.0, "min_p": 0.0, "top_k": 0, "top_p": 0.0}
    extra = {f"general.sampling.{name}": value for name, value in names.items()}
    found = open_file(write_model(llama, tmp_path / "model.gguf", extra=extra)).card.generation_config
    assert {**found, "top_p": 0} == {"temperature": 0, "min_p": 0, "top_k": 0, "top_p": 0}
    assert 0 < found["top_p"] < 1e-3  # 0 is refused in requests; one token is left
    with pytest.raises(ConfigError, match=r"general\.sampling\.temp must be a positive number or 0, not -1"):
        open_file(write_model(llama, tmp_path / "bad.gguf", extra={"general.sampling.temp": -1.0})).card  # noqa: B018


def test_a_window_of_llamas_files_is_mistrals(tmp_path, drive, random_prompts):
    folder = make_tiny_model("mistral", tmp_path / "folder", sliding_window=8)
    as_llama = {"ARCH.attention.sliding_window": 8}
    file = write_model(folder, tmp_path / "model.gguf", extra=as_llama, architecture="llama")
    prompts = random_prompts((3, 40))
    assert drive(file, dtype="float32").generate(prompts, 8) == drive(folder, dtype="float32").generate(prompts, 8)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_factors_that_a_model_does_not_take_are_refused(family, tmp_path):
    folder = make_tiny_model(family, tmp_path / "folder", **(AS_ALL_GEMMAS if family == "gemma3" else {}))
    factors = {"rope_freqs.weight": np.ones(8, np.float32)}
    file = write_model(folder, tmp_path / "model.gguf", tensors=factors)
    with pytest.raises(ConfigError, match=r"model\.gguf: the tensor rope_freqs\.weight is not supported"):
        open_file(file)


def test_a_kind_of_scaling_beside_factors_is_refused(llama, tmp_path):
    factors = {"rope_freqs.weight": np.ones(8, np.float32)}
    file = write_model(llama, tmp_path / "model.gguf", {}, {"ARCH.rope.scaling.type": "linear"}, factors)
    with pytest.raises(ConfigError, match=r"llama\.rope\.scaling\.type 'linear' beside the tensor rope_freqs"):
        open_file(file)


@pytest.fixture
def little_memory():
    """As on a machine of 64 GiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (64 << 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_file_may_be_larger_than_the_memory(kind, llama, tmp_path, little_memory):
    folder = shutil.copytree(llama, tmp_path / "folder")
    file = write_model(folder, tmp_path / "model.gguf") if kind == "gguf" else folder / "model.safetensors"
    os.truncate(file, 128 << 30)  # a hole, which takes no room
    files = open_file(file if kind == "gguf" else folder)
    weights = files.weights(torch.float32, torch.device("cpu"), None, WEIGHT_FORMATS[None])
    assert weights.read("model.norm.weight", (64,)).isfinite().all()


def test_another_tokenizer_can_take_the_files_place(llama, tmp_path):
    file = write_model(llama, tmp_path / "model.gguf", extra={"tokenizer.ggml.pre": "nobody-knows"})
    with pytest.raises(ConfigError, match="nobody-knows"):
        open_file(file)
    files = open_file(file, tokenizer=str(llama))
    assert files.card.tokenizer_file == str(llama / "tokenizer.json")
    assert files.end_token_ids(512) == (0,)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, ["tokenizer.ggml.model", "bert"]),
        ({"tokenizer.ggml.pre": "nobody-knows"}, ["tokenizer.ggml.pre", "nobody-knows"]),
        ({"ARCH.expert_count": 8}, ["llama.expert_count"]),
        ({"ARCH.rope.scaling.type": "longrope"}, ["longrope"]),
        ({"ARCH.rope.dimension_count": 8}, ["llama.rope.dimension_count", "16"]),
        ({"ARCH.attention.head_count": "four"}, ["llama.attention.head_count", "four"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(llama, tmp_path, extra, words, monkeypatch):
    monkeypatch.setattr("flashserve.models.gguf.files.GgufWeights", None)
    file = write_model(llama, tmp_path / "model.gguf", extra=extra)
    with pytest.raises(ConfigError) as caught:
        open_file(file)
    for word in ("model.gguf", *words):
        assert word in str(caught.value)


def test_an_unknown_architecture_is_refused_by_name(llama, tmp_path):
    file = write_model(llama, tmp_path / "model.gguf", architecture="mamba")
    with pytest.raises(ConfigError, match=r"model\.gguf: architecture 'mamba' is not supported"):
        open_file(file)


def test_a_tensor_that_no_model_has_is_named(llama, tmp_path, drive):
    file = write_model(llama, tmp_path / "model.gguf", tensors={"blk.0.new.weight": np.zeros(4, np.float32)})
    with pytest.raises(ConfigError, match=r"blk\.0\.new\.weight"):
        drive(file)


def test_metadata_of_other_sizes_than_the_tensors_are_refused(llama, tmp_path):
    file = write_model(llama, tmp_path / "model.gguf")
    key = b"llama.feed_forward_length\x04\0\0\0"
    file.write_bytes(file.read_bytes().replace(key + b"\x80", key + b"\x40"))
    with pytest.raises(ConfigError, match=r"model\.gguf: llama\.feed_forward_length must be 128, .* not 64"):
        open_file(file)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "attention.novel", 1.0),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "rope.scaling.factor", 8.0),  # of no kind
        ("qwen2", "attention.sliding_window", 32),
        ("gpt2", "attention.sliding_window", 32),
    ],
)
def test_a_key_that_has_no_effect_is_told(family, key, value, tmp_path, caplog):
    folder = make_tiny_model(family, tmp_path / "folder")
    open_file(write_model(folder, tmp_path / "model.gguf", extra={f"ARCH.{key}": value}))
    assert f"holds {family}.{key}, not known and without effect" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_of_keys_that_have_their_effect_nothing_is_told(family, tmp_path, caplog):
    folder = make_tiny_model(family, tmp_path / "folder", **(AS_ALL_GEMMAS if family == "gemma3" else {}))
    open_file(write_model(folder, tmp_path / "model.gguf"))
    assert "without effect" not in caplog.text


def test_a_folder_of_several_files_asks_which(llama, tmp_path):
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        write_model(llama, tmp_path / name)
    with pytest.raises(ConfigError, match=r"several models: name one of a\.gguf, b\.gguf$"):
        open_file(tmp_path)
    (tmp_path / "b.gguf").unlink()
    assert open_file(tmp_path).folder.name == "a.gguf"


def test_the_tokenizer_is_made_once(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_model(llama, tmp_path / "model.gguf")
    made = open_file(file).card.tokenizer_file
    monkeypatch.setattr("flashserve.models.gguf.tokenizer.build_tokenizer", None)
    assert open_file(file).card.tokenizer_file == made
    assert Path(made).is_relative_to(tmp_path)
    assert json.loads(Path(made).read_text())["model"]["type"] == "BPE"


def test_a_file_of_the_hub_is_downloaded_alone(llama, tmp_path, monkeypatch):
    asked = {}

    def download(repository, allow_patterns, **rest):
        asked[repository] = (allow_patterns, rest["revision"], rest["cache_dir"])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("m-Q4_K_M.gguf", "m-Q8_0.gguf"):  # an earlier download's lies there, too
        write_model(llama, tmp_path / name)
    files = open_file("org/m-GGUF:Q8_0", revision="main", download_dir="/somewhere")
    assert files.folder == tmp_path / "m-Q8_0.gguf"
    patterns, *rest = asked["org/m-GGUF"]
    assert "*[-._]Q8_0.gguf" in patterns and rest == ["main", "/somewhere"]
