"""Names, hub ids and folders to models; and models put together from parts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import load_tower
from PIL import Image
from plm_tiny import golden_case, tiny_config, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn

import perception_encoder as pe
import perception_lm as plm
from perception.errors import CheckpointError, ConfigError, UnknownName
from perception.hub import SNAPSHOT
from perception.pixels import PixelSpec
from perception_encoder.protocol import Features
from perception_lm import checkpoints, zoo
from perception_lm import foreign_configs as foreign
from perception_lm.checkpoints import export, save
from perception_lm.config import MediaConfig, ProjectorConfig
from perception_lm.decoder import Decoder
from perception_lm.projector import PixelShuffleProjector, PoolingProjector
from perception_lm.tokenizer import LlamaTokenizer
from perception_lm.zoo import MODELS, compose, count_parameters, describe, estimate, list_models, load, load_model

PUBLISHED = {
    "1B": (1_235_814_400, 291_415_040, 6_295_552, 1_533_524_992),
    "3B": (3_212_749_824, 291_415_040, 12_589_056, 3_516_753_920),
    "8B": (8_030_261_248, 1_740_922_624, 23_076_864, 9_794_260_736),
}


@pytest.fixture
def words(golden: Path) -> Path:
    return golden / "plm" / "tokenizer.model"


# --- Looking up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_models_have_their_parameter_counts(size: str) -> None:
    """Counted on the meta device; the tied matrix of 1B and 3B once."""
    counts = count_parameters(MODELS.get(f"Perception-LM-{size}").config)
    assert tuple(counts.values()) == PUBLISHED[size]
    assert describe(f"facebook/Perception-LM-{size}")["parameters"] == counts


def test_published_models_are_described() -> None:
    assert {"Perception-LM-1B", "Perception-LM-3B", "Perception-LM-8B"} <= set(list_models("*lm-?b"))
    told = describe("Perception-LM-3B")
    assert told["hub"] == "facebook/Perception-LM-3B"
    assert told["licence"] == "FAIR Noncommercial Research License"
    assert told["base"] == "Llama-3.2-3B-Instruct"
    config = MODELS.get("Perception-LM-3B").config
    assert (config.decoder.head_dim, config.decoder.kv_heads, config.decoder.context) == (128, 8, 11_520)
    assert config.media == MediaConfig()
    assert config.vision == pe.zoo.MODELS.get("PE-Lang-L14-448-Tiling").config
    with pytest.raises(LookupError, match="did you mean 'Perception-LM-"):
        describe("perception-lm-2b")
    with pytest.raises(LookupError, match="no language model named 'Perception-LM-2B'"):
        load("Perception-LM-2B")
    for call in (describe, load, zoo.estimate, zoo.download):
        with pytest.raises(UnknownName, match="did you mean 'PLM-nano'"):
            call("PLM-nan")
        with pytest.raises(UnknownName, match="'PE-Core-nano' is a vision encoder; perception_encoder"):
            call("PE-Core-nano")
    with pytest.raises(LookupError, match="no language model named 'xxx"):
        load("x" * 300)  # no file system takes so long a name, and none is asked to


def test_a_catalogue_is_one_for_all_kinds() -> None:
    """Rows of language models have what rows of towers have."""
    rows = {row["name"]: row for row in [*zoo.catalogue(), *pe.zoo.catalogue("PE-*")]}
    lm, tower = rows["Perception-LM-1B"], rows["PE-Core-L14-336"]
    assert set(tower) < set(lm)
    assert set(rows["PLM-nano"]) == set(lm)
    assert lm["weights"] == {"hub": "facebook/Perception-LM-1B"}
    assert rows["PLM-nano"]["weights"] == {"native": "package://weights/PLM-nano"}
    assert rows["PE-Core-nano"]["weights"] == {"native": "package://weights/PE-Core-nano"}
    assert (lm["pixels"]["size"], lm["context"], rows["PLM-nano"]["pixels"]["size"]) == (448, 11_520, 64)


def test_memory_is_estimated_from_the_config() -> None:
    """The cache of the published models: 32, 112 and 128 KiB a token in bfloat16; the weights at 2 bytes each."""
    for size, kib in (("1B", 32), ("3B", 112), ("8B", 128)):
        memory = estimate(f"Perception-LM-{size}", tokens=1000)
        assert memory.cache == kib * 1024 * 1000
        assert memory.weights == 2 * PUBLISHED[size][3]
    assert estimate("Perception-LM-1B", dtype="float32").weights == 4 * PUBLISHED["1B"][3]
    assert estimate("Perception-LM-1B", batch=3).cache == 3 * 32 * 1024 * 11_520
    memory = estimate(tiny_config())
    assert memory.total == memory.weights + memory.cache + memory.media + memory.logits


# --- The hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_fetches_one_layout_and_no_pickle(
    golden: Path, tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the published repository, which holds both layouts, the safetensors come and the `.pth` stays."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repository = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    repository += ["model.safetensors.index.json", "processor_config.json", "preprocessor_config.json", "README.md"]
    repository += ["original/consolidated.pth", "original/params.json", "original/tokenizer.model"]
    fetched: dict[str, Any] = {}
    shutil.copytree(golden / "plm" / "A" / "hf", tmp_path / "snapshot")
    shutil.copy(words, tmp_path / "snapshot")

    def snapshot(repo_id: str, allow_patterns: list[str], **options: Any) -> str:
        fetched.update(repo=repo_id, files=list(filter_repo_objects(repository, allow_patterns=allow_patterns)))
        fetched.update(options)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for name in ("Perception-LM-1B", "facebook/Perception-LM-1B", "hf://facebook/Perception-LM-1B"):
        fetched.clear()
        model, _, _ = load_model(name, device="cpu", revision="abc")
        assert fetched["repo"] == "facebook/Perception-LM-1B"
        assert fetched["revision"] == "abc"
        assert not [file for file in fetched["files"] if file.endswith((".pth", ".bin", ".pt"))]
        assert {"config.json", "model-00001-of-00002.safetensors", "tokenizer.json"} <= set(fetched["files"])
        assert model.decoder.config.width == 48
    assert "*.pth" not in SNAPSHOT


def test_f05_offline_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("the network was tried"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("Perception-LM-1B", "facebook/Perception-LM-1B"):
        with pytest.raises(CheckpointError, match=r"facebook/Perception-LM-1B is not in the cache"):
            load(name, offline=True)


@pytest.mark.parametrize("name", ["../../etc", "a/b/c", "a\0b/c", "x" * 300 + "/y"])
def test_f27_what_is_no_hub_id_is_refused(name: str) -> None:
    with pytest.raises((ConfigError, CheckpointError)):
        load(name, offline=True)


def test_a_file_is_no_model(golden: Path) -> None:
    with pytest.raises(ConfigError, match="is a file; a language model is a folder"):
        load(golden / "plm" / "A" / "original" / "consolidated.pth")


# --- Loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("layout", ["original", "hf", "native"])
def test_load_gives_an_assistant_that_answers(
    golden: Path, tmp_path: Path, words: Path, name: str, layout: str
) -> None:
    """The greedy answer of the reference, from every layout, with the tokenizer found or given."""
    folder = golden / "plm" / name / layout
    given = words if layout == "hf" else None
    if layout == "native":
        folder = tmp_path / "native"
        load(golden / "plm" / name / "original", device="cpu").save(folder)
    assistant = load(folder, device="cpu", tokenizer=given)
    assert assistant.tokenizer.vocab == 689
    assert not assistant.model.training
    case = json.loads((golden / "plm" / name / "cases.json").read_text())["cases"]["one"]
    picture = golden / "plm" / name / "image1.png"
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": case["question"]}],
        }
    ]
    (reply,) = assistant.generate([messages], max_new_tokens=24, tiling="vanilla", temperature=0)
    assert reply.tokens == case["greedy_ids"]


@pytest.mark.parametrize("layout", ["original", "hf", "native"])
def test_assistants_are_saved_in_every_layout(golden: Path, tmp_path: Path, layout: str) -> None:
    assistant = load(golden / "plm" / "B" / "original", device="cpu")
    assistant.save(tmp_path / "out", format=layout)
    again = load(tmp_path / "out", device="cpu")
    tokens, pixels, wanted = golden_case(golden, "B")
    with torch.inference_mode():
        assert (again.model(tokens, pixels)[0, -1] - wanted).abs().max() < 1e-4
    assert again.processor.preprocess == assistant.processor.preprocess
    assert again.tokenizer.encode("hello <|image|>") == assistant.tokenizer.encode("hello <|image|>")


def test_a_tokenizer_that_does_not_fit_is_refused(golden: Path, tmp_path: Path, words: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model and no tokenizer\.json"):
        load(golden / "plm" / "A" / "hf", device="cpu")
    config = tiny_config(vocab=690)
    model = tiny_model(config)
    save(model, tmp_path / "more", media=config.media)
    with pytest.raises(ConfigError, match="689 ids and the model 690"):
        load(tmp_path / "more", tokenizer=words, device="cpu")
    model = tiny_model()
    model.media_token = 441
    save(model, tmp_path / "other", media=tiny_config().media)
    with pytest.raises(ConfigError, match="image token is 435, but the model keeps slots with 441"):
        load(tmp_path / "other", tokenizer=words, device="cpu")
    with pytest.raises(ConfigError, match="435"):
        export(model, tmp_path / "x", "hf", tokenizer=LlamaTokenizer.from_file(words))


def test_dtypes_are_as_asked(golden: Path) -> None:
    folder = golden / "plm" / "A" / "hf"  # stored in bfloat16
    found = {dtype: load_model(folder, device="cpu", dtype=dtype)[0] for dtype in ("auto", "stored", "float16")}
    types = {dtype: {p.dtype for p in model.parameters()} for dtype, model in found.items()}
    assert types == {"auto": {torch.float32}, "stored": {torch.bfloat16}, "float16": {torch.float16}}
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        load_model(folder, device="cpu", dtype="int8")
    with pytest.raises(ConfigError, match="not available"):
        load_model(folder, device="cuda:77")


# --- Putting together ------------------------------------------------------------------------------------------------


def llama_folder(tmp_path: Path, layout: str, words: Path) -> tuple[Path, Decoder]:
    config = replace(tiny_config(tied=False).decoder, heads=5, kv_heads=1, context=131_072)
    torch.manual_seed(0)
    decoder, folder = Decoder(config), tmp_path / layout
    folder.mkdir()
    shutil.copy(words, folder)
    if layout == "hf":
        state = checkpoints.convert(decoder.state_dict(), checkpoints.hugging_face_llama(config), back=True)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
        settings = foreign.write_hugging_face_llama(config, dtype="float32")
        (folder / "config.json").write_text(json.dumps(settings))
    else:
        state = checkpoints.convert(decoder.state_dict(), checkpoints.meta_llama(config), back=True)
        torch.save(dict(state), folder / "consolidated.00.pth")
        params = {"dim": 40, "n_layers": 2, "n_heads": 5, "n_kv_heads": 1, "vocab_size": 689, "multiple_of": 8}
        params |= {"ffn_dim_multiplier": 0.67, "rope_theta": 500000.0, "norm_eps": 1e-5}
        params |= {"use_scaled_rope": True, "rope_scale_factor": 32, "high_freq_factor": 4}
        (folder / "params.json").write_text(json.dumps(params))
    return folder, decoder


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_tower_and_a_llama_become_one_model(golden: Path, tmp_path: Path, words: Path, layout: str) -> None:
    folder, decoder = llama_folder(tmp_path, layout, words)
    tower = load_tower(golden, "lang_cls_ls")
    assistant = compose(encoder=tower, decoder=folder, device="cpu")
    tokens = torch.randint(0, 400, (1, 9))
    with torch.inference_mode():
        torch.testing.assert_close(assistant.model(tokens), decoder(decoder.embed(tokens)))
    assert assistant.model.encoder is tower
    assert isinstance(assistant.model.projector, PoolingProjector)
    assert assistant.model.media_token == 435
    assert assistant.processor.media == MediaConfig(tile=32)
    assert assistant.processor.slots == 4
    again = compose(encoder=tower, decoder=folder, device="cpu")
    torch.testing.assert_close(again.model.projector.fc1.weight, assistant.model.projector.fc1.weight, atol=0, rtol=0)


def test_parts_by_path_name_and_config(golden: Path, tmp_path: Path, words: Path) -> None:
    """An encoder from its folder, fresh decoder weights from a config, the other projector; saved and read again."""
    pe.save(load_tower(golden, "lang_nocls_ls"), tmp_path / "tower")
    config = tiny_config().decoder
    assistant = compose(
        encoder=tmp_path / "tower",
        decoder=replace(config, width=32, heads=4, kv_heads=2),
        projector="pixel_shuffle",
        tokenizer=words,
        device="cpu",
    )
    assert isinstance(assistant.model.projector, PixelShuffleProjector)
    assert assistant.processor.preprocess == PixelSpec(size=28, interpolation="bicubic")
    assistant.save(tmp_path / "out")
    again = load(tmp_path / "out", device="cpu")
    for name, tensor in assistant.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert again.processor.preprocess == assistant.processor.preprocess
    assert again.processor.media == assistant.processor.media
    # The decoder of a whole model serves as well.
    decoder, path = zoo.load_decoder(tmp_path / "out", device="cpu")
    assert path == tmp_path / "out" / "tokenizer.model"
    assert torch.equal(decoder.token_embed.weight, assistant.model.decoder.token_embed.weight)


class Strange(nn.Module):
    """A tower of somebody else's."""

    width, patch_size = 12, 8

    def __init__(self, preprocess: Any = None):
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 8, 8)
        if preprocess is not None:
            self.preprocess = preprocess

    def forward(self, pixels: Tensor) -> Features:
        x = self.embed(pixels).permute(0, 2, 3, 1)
        return Features(patches=x, prefix=x[:, :0, 0])


class TimmLike:
    """What the adapter of another library keeps: a list of transforms with a normalisation."""

    class transform:
        class normalize:
            mean, std = (0.4, 0.5, 0.6), torch.tensor([0.2, 0.2, 0.3])

        transforms = (object(), normalize)


def test_any_encoder_fits_and_its_pixels_are_its_own(words: Path) -> None:
    decoder = tiny_config().decoder
    own = PixelSpec(size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assistant = compose(encoder=Strange(own), decoder=decoder, tokenizer=words, device="cpu")
    assert assistant.processor.preprocess == replace(own, interpolation="bicubic")
    assert assistant.processor.slots == 4
    media = MediaConfig(tile=48, context=500)
    assistant = compose(encoder=Strange(TimmLike()), decoder=decoder, tokenizer=words, media=media, device="cpu")
    spec = assistant.processor.preprocess
    assert (spec.size, spec.mean) == (48, (0.4, 0.5, 0.6))
    assert spec.std == pytest.approx((0.2, 0.2, 0.3))
    with pytest.raises(ConfigError, match="Strange does not say its picture size"):
        compose(encoder=Strange(), decoder=decoder, tokenizer=words, device="cpu")
    with pytest.raises(ConfigError, match="Strange does not say how its pixels are normalised"):
        compose(encoder=Strange(), decoder=decoder, tokenizer=words, media=media, device="cpu")
    from PIL import Image

    reply = compose(
        encoder=Strange(), decoder=decoder, tokenizer=words, media=media, pixels=replace(own, size=48), device="cpu"
    ).ask(Image.new("RGB", (50, 40), "red"), "?", max_new_tokens=3, tiling="vanilla")
    assert isinstance(reply, str)


def test_parts_that_do_not_fit_are_refused(golden: Path, words: Path) -> None:
    tower, decoder = load_tower(golden, "lang_cls_ls"), tiny_config().decoder
    with pytest.raises(ConfigError, match="no projector 'mlp'"):
        compose(encoder=tower, decoder=decoder, projector="mlp", tokenizer=words, device="cpu")
    with pytest.raises(ConfigError, match="without a tokenizer"):
        compose(encoder=tower, decoder=decoder, device="cpu")
    wrong, odd = ProjectorConfig(in_width=9, width=40), ProjectorConfig(in_width=32, width=40, pool=3)
    with pytest.raises(ConfigError, match="the projector maps 9 to 40"):
        compose(encoder=tower, decoder=decoder, projector=wrong, tokenizer=words, device="cpu")
    with pytest.raises(ConfigError, match="689 ids and the decoder 600"):
        compose(encoder=tower, decoder=replace(decoder, vocab=600), tokenizer=words, device="cpu")
    with pytest.raises(ConfigError, match="does not pool by 3"):
        compose(encoder=tower, decoder=decoder, projector=odd, tokenizer=words, device="cpu")


def test_any_model_of_transformers_is_a_decoder(golden: Path, tmp_path: Path, words: Path) -> None:
    try:
        import transformers
    except Exception as error:
        pytest.skip(f"transformers cannot be imported here: {error}")
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=700, max_position_embeddings=512)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    tower = load_tower(golden, "lang_cls_ls")
    assistant = compose(encoder=tower, decoder=tmp_path / "qwen", tokenizer=words, device="cpu")
    assert type(assistant.model.decoder).__name__ == "TransformersDecoder"
    assert assistant.processor.media.context == 512
    picture = golden / "plm" / "A" / "image1.png"
    talk = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    text = [{"role": "user", "content": "A rather longer question, without a picture."}]
    both = assistant.generate([talk, text], max_new_tokens=6, tiling="vanilla")
    alone = [assistant.generate([one], max_new_tokens=6, tiling="vanilla")[0] for one in (talk, text)]
    assert [reply.tokens for reply in both] == [reply.tokens for reply in alone]
    with pytest.raises(ConfigError, match="its decoder is a TransformersDecoder"):
        assistant.save(tmp_path / "out")


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "open_clip/ViT-B-32", "open_clip/PE-Core-T-16-384"])
def test_encoders_of_other_libraries(name: str) -> None:
    """Their size, their mean and deviation; an answer comes out, and gradients reach the projector."""
    library = name.split("/")[0]
    try:
        __import__(library)
    except Exception as error:
        pytest.skip(f"{library} cannot be imported here: {error}")
    encoder = pe.load_encoder(name, pretrained=False, device="cpu")
    words = plm.LlamaTokenizer.of_bytes()
    small = plm.DecoderConfig(width=32, depth=1, heads=2, kv_heads=1, mlp_width=64, vocab=words.vocab)
    projector = plm.PixelShuffleProjector(encoder.width, 32, 7) if name == "open_clip/ViT-B-32" else "pooling"
    assistant = plm.compose(encoder=encoder, decoder=small, tokenizer=words, projector=projector)
    side = {"timm/vit_tiny_patch16_224": 224, "open_clip/ViT-B-32": 224, "open_clip/PE-Core-T-16-384": 384}[name]
    picture = Image.new("RGB", (60, 40), "red")
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]}]
    batch = assistant.processor([messages], tiling="vanilla")
    assert batch.pixels.shape == (1, 3, side, side)
    assert len(assistant.generate([messages], tiling="vanilla", max_new_tokens=3)[0].tokens) == 3
    loss, _ = assistant.model(batch.tokens, batch.pixels, labels=batch.tokens)
    loss.backward()
    assert all(parameter.grad is not None for parameter in assistant.model.projector.parameters())
