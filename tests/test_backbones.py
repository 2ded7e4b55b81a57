"""Every backbone by its name: its size, Eagle2 under its released names, and export after training.

Sizes are the real ones, on the meta device; weights are small and random, saved by the library.
"""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

import common
import data
import dualvla
import twinbrain
import vita_vla
from parts import backbones

ALONE = common.Dist(0, 1, torch.device("cpu"))
TINY = Path(common.BACKBONES["tiny"])
SIZES = json.loads(backbones.SIZES.read_text())
SCRIPTS = {"twinbrain": twinbrain, "vita_vla": vita_vla, "dualvla": dualvla}
SMALL = dict(dtype="fp32", batch=2, width=32, depth=1, heads=2, augment=0, optimizer="adamw")


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (size, size, 3), np.uint8) for size in sizes]


# --- sizes ----------------------------------------------------------------------------------------


def table(text):
    """What --describe printed -> {what: {part: (total, trainable, frozen)}}."""
    out = {}
    for line in text.splitlines():
        if line.endswith("frozen"):
            rows = out.setdefault(re.split(r"  +", line)[0], {})
        elif found := re.match(r"  ([\w.]+) +([\d,]+) +([\d,]+) +([\d,]+)$", line):
            rows[found[1]] = tuple(int(n.replace(",", "")) for n in found.groups()[1:])
    return out


@pytest.mark.parametrize("name", [n for n in common.BACKBONES if n != "tiny"])
def test_every_backbone_has_its_published_size(name):
    with torch.device("meta"):
        model, _ = (common.load_vlm if name == "VITA-1.5" else common.load_backbone)(name)
    count = common.param_counts(model)["total"]
    if name == "VITA-1.5":  # Qwen2.5-7B less its head, InternViT-300M, the projector
        parts = 7_615_616_512 - 152_064 * 3584, 304_012_288, 4097 * 3584 + 3585 * 3584
    elif name == "Eagle2-2B":  # SigLIP so400m at 448, Qwen2.5-1.5B of 151,674 words, head, MLP
        language = 1_543_714_304 - (151_936 - 151_674) * 1536 + 151_674 * 1536
        parts = 413_327_088, language, 2 * 4608 + 4609 * 1536 + 1537 * 1536
    else:
        parts = (SIZES[name]["published"],)
    assert count == sum(parts) and all(p.is_meta for p in model.parameters())


def test_describe_prints_each_part(capsys):
    twinbrain.main(["--describe", "--preset", "paper"])
    rows = table(capsys.readouterr().out)["TwinBrainVLA --brain twin"]
    whole = SIZES["Qwen3-VL-4B"]["published"]
    left = [v for part, v in rows.items() if part.startswith("left.")]
    assert [sum(column) for column in zip(*left)] == [whole, 0, whole]
    right = [v for part, v in rows.items() if part.startswith("right.")]
    assert sum(total for total, *_ in right) == whole == sum(trained for _, trained, _ in right)
    others = (v for part, v in rows.items() if part != "all")
    assert rows["all"] == tuple(map(sum, zip(*others)))


def test_describe_finds_the_papers_thirty_million(capsys):
    """Stage 1 of VITA-VLA on CALVIN trains 31.5M parameters beside a frozen VITA-1.5."""
    vita_vla.main(["--describe", "--preset", "calvin", "--recipe", "freeze-vlm"])
    told = table(capsys.readouterr().out)
    assert told["VITA-VLA, align"]["all"][1] == 31_503_360
    assert told["VITA-VLA, finetune"]["vlm.language"][2] == 0
    assert told["VITA-VLA, frozen"]["vlm.language"][1] == 0
    assert told["VITA-VLA, teacher"]["eyes"][1] == 0


def test_describe_shows_what_each_stage_of_dualvla_trains(capsys):
    dualvla.main(["--describe", "--preset", "paper", "--backbone", "Eagle2-2B"])
    out = capsys.readouterr().out
    assert "published: 2B" in out
    told, layer = table(out), 2 * (2 * 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960)
    expert, dual = told["DualVLA --stage expert"], told["DualVLA --stage dual"]
    assert expert["vlm.language_model"][1] == 28 * 128 * layer + (151_674 + 256) * 1536
    assert dual["vlm.language_model"][1] == 2 * 28 * 128 * layer
    assert expert["flow"][1] > 0 == dual["flow"][1] == dual["vlm.vision_tower"][1]


def test_describe_counts_the_rows_of_new_words(capsys):
    """Qwen3-VL has 151,936 rows for 151,669 words: FAST's 2048 need more, DualVLA's 256 do not."""
    twinbrain.main(["--describe", "--preset", "paper", "--ablation", "c-fast"])
    rows = table(capsys.readouterr().out)["TwinBrainVLA --brain vanilla"]
    whole, new = SIZES["Qwen3-VL-4B"]["published"], 151_669 + 2048 - 151_936
    assert rows["all"] == (whole + new * 2560, whole + new * 2560, 0)
    dualvla.main(["--describe", "--backbone", "Qwen3-VL-2B", "--stage", "expert"])
    told = table(capsys.readouterr().out)
    words = [v[0] for part, v in told["DualVLA --stage expert"].items() if "language" in part]
    layers = told["backbone Qwen3-VL-2B"]["language_model"][0]
    rank = dualvla.Config().rank
    assert 0 < words[0] - layers and (words[0] - layers) % (28 * rank) == 0


def test_describe_takes_a_folder(capsys):
    twinbrain.main(["--describe", "--backbone", str(TINY), "--brain", "vanilla"])
    rows = table(capsys.readouterr().out)[f"backbone {TINY}"]
    assert rows["all"][0] == sum(t.numel() for t in load_file(TINY / "model.safetensors").values())


# --- Eagle2 ---------------------------------------------------------------------------------------

EAGLE = {  # the keys of the released config.json, scaled down
    "model_type": "eagle_chat", "architectures": ["Eagle2ChatModel"], "select_layer": -1,
    "downsample_ratio": 0.5, "force_image_size": 56, "template": "qwen2-chat",
    "dynamic_image_size": True, "use_thumbnail": True, "torch_dtype": "bfloat16",
    "llm_config": dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=1000, hidden_size=64,
        intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False, use_sliding_window=False,
    ),
    "vision_config": dict(
        model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, patch_size=14,
        num_hidden_layers=2, num_attention_heads=2, image_size=56, layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
    ),
}  # fmt: skip


def plant(folder):
    """The folder brings Python of its own, as released ones do; here it leaves a mark if run."""
    (folder / "planted.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    models = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageTextToText"), "planted.X")
    words = {"AutoTokenizer": ["planted.X", "planted.X"]}
    for name, mapped in (("config.json", models), ("tokenizer_config.json", words)):
        settings = json.loads((folder / name).read_text()) | {"auto_map": mapped}
        (folder / name).write_text(json.dumps(settings))


def never_runs_its_own(folder, load, monkeypatch):
    """Even where a user would say yes to the library's question."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda words="": asked.append(words) or "y")
    load(str(folder))
    assert "planted" in (folder / "config.json").read_text()
    assert not asked and not (folder / "ran").exists()


class Eagle:
    """Eagle2 scaled down: the library's parts, and a folder with the released names."""

    def __init__(self, folder):
        common.seed_all(0)
        text, vision = (EAGLE[k].copy() for k in ("llm_config", "vision_config"))
        rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
        config = transformers.Qwen2Config(**text, rope_parameters=rope)
        self.folder, self.text = folder, transformers.Qwen2ForCausalLM(config).eval()
        config = transformers.SiglipVisionConfig(**vision)
        self.vision = transformers.SiglipVisionModel(config).eval()
        self.mlp = nn.Sequential(
            nn.LayerNorm(128), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 64)
        )
        with torch.no_grad():
            for model in (self.vision, self.text, self.mlp):
                for p in model.parameters():  # bfloat16 on the disk, so nothing is lost there
                    p.copy_((p + 0.1 * torch.randn_like(p)).bfloat16())
        (folder / "config.json").write_text(json.dumps(EAGLE))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            words = (TINY / name).read_text().replace("<robot_action_", "<something_else_")
            (folder / name).write_text(words)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>"], special_tokens=True)
        tokenizer.save_pretrained(folder)
        out = {"vision_model.vision_model." + n: t for n, t in self.vision.state_dict().items()}
        out |= {"language_model." + n: t for n, t in self.text.state_dict().items()}
        out |= {"mlp1." + n: t for n, t in self.mlp.state_dict().items()}
        self.write({n: t.bfloat16() for n, t in out.items()})
        plant(folder)

    def write(self, tensors):
        names, index = sorted(tensors), {}
        for part, some in ((1, names[::2]), (2, names[1::2])):
            file = f"model-0000{part}-of-00002.safetensors"
            content = {n: tensors[n].contiguous() for n in some}
            save_file(content, self.folder / file, {"format": "pt"})
            index |= {n: file for n in some}
        content = {"metadata": {}, "weight_map": index}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(content))

    def see(self, pixels):
        """-> (n, 4, 64): 2 x 2 patches' states side by side are one token, projected."""
        out = []
        for h in self.vision(pixels).last_hidden_state.reshape(-1, 4, 4, 32):
            places = [(2 * r, 2 * c) for r, c in np.ndindex(2, 2)]
            square = [[h[r, c], h[r, c + 1], h[r + 1, c], h[r + 1, c + 1]] for r, c in places]
            out.append(torch.stack([torch.cat(four) for four in square]))
        return self.mlp(torch.stack(out))


@pytest.fixture(scope="module")
def eagle(tmp_path_factory):
    return Eagle(tmp_path_factory.mktemp("eagle"))


def test_eagle_is_composed_as_released(eagle):
    vlm, processor = common.load_backbone(str(eagle.folder))
    pixels, grids = processor.images(pictures(70, 20))
    assert pixels.shape == (2, 3, 56, 56) and grids == ((1, 4, 4),) * 2
    same = pictures(56)[0]
    assert processor.images([same])[0][0, 1, 7, 9] == pytest.approx(same[7, 9, 1] / 127.5 - 1, 1e-4)
    long, _ = processor.prompt("Be brief.", "\nWhat is it?", grids)
    short, _ = processor.prompt("", "Go", grids[:1])
    prompt = processor.pad([long, short], [grids, grids[:1]])
    x = vlm.get_input_embeddings()(prompt["input_ids"])
    seen = torch.from_numpy(np.concatenate([pixels, pixels[:1]]))
    with torch.no_grad():
        h = vlm.model(inputs_embeds=x, attention_mask=common.causal_mask(prompt["real"]),
                      position_ids=prompt["position_ids"], pixel_values=seen)  # fmt: skip
        ours = vlm.lm_head(h.last_hidden_state)
        for row, ids, own in ((0, long, seen[:2]), (1, short, seen[2:])):
            x = eagle.text.get_input_embeddings()(torch.tensor([ids]))
            places = torch.tensor(ids) == processor.image_token_id
            x[0, places] = eagle.see(own).flatten(0, 1)
            want = eagle.text(inputs_embeds=x).logits[0]
            assert torch.allclose(ours[row, -len(ids) :], want, atol=1e-4)


def test_an_eagles_own_code_never_runs(eagle, monkeypatch):
    never_runs_its_own(eagle.folder, common.load_backbone, monkeypatch)


def test_eagle_is_asked_as_instructvla_asks(eagle):
    _, processor = common.load_backbone(str(eagle.folder))
    picture = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    grids = ((1, 4, 4),) * 2
    for some, marks in ((grids[:1], picture + "\n"),
                        (grids, f"<image 1>{picture}\n<image 2>{picture}\n")):  # fmt: skip
        ids, end = processor.prompt("Help.", "\nGo", some, "yes")
        want = "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\n" + marks
        want += "Go<|im_end|>\n<|im_start|>assistant\n"
        assert list(ids) == processor.tokenizer.encode(want, add_special_tokens=False)
        assert ids.count(processor.image_token_id) == 4 * len(some)
        assert end[-1] == processor.tokenizer.eos_token_id
    assert processor.words(ids).count("<image>") == 2


def test_eagle_in_bfloat16_and_with_the_newer_keys(eagle, tmp_path):
    folder = shutil.copytree(eagle.folder, tmp_path / "copy")
    settings = EAGLE | {"model_type": "eagle_2_5_vl", "text_config": EAGLE["llm_config"]}
    settings.pop("llm_config")
    (folder / "config.json").write_text(json.dumps(settings))
    for file in folder.glob("*.safetensors"):
        half = {n: t.bfloat16() for n, t in load_file(file).items()}
        save_file(half, file, {"format": "pt"})
    vlm, _ = common.load_backbone(str(folder), "bf16")
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    kept = eagle.text.state_dict()
    for name, tensor in vlm.model.language_model.state_dict().items():
        assert torch.equal(tensor, kept["model." + name].bfloat16())


def test_eagle_follows_what_its_config_says(eagle, tmp_path):
    """Tied words need no head in the file; an earlier layer may be the one that is read."""
    folder = shutil.copytree(eagle.folder, tmp_path / "copy")
    text = EAGLE["llm_config"] | {"tie_word_embeddings": True}
    settings = EAGLE | {"llm_config": text, "select_layer": -2}
    (folder / "config.json").write_text(json.dumps(settings))
    for file in folder.glob("*.safetensors"):
        tensors = {n: t for n, t in load_file(file).items() if "lm_head" not in n}
        save_file(tensors, file, {"format": "pt"})
    vlm, processor = common.load_backbone(str(folder))
    assert vlm.lm_head.weight is vlm.get_input_embeddings().weight
    common.export_backbone(vlm, str(folder), processor.tokenizer, tmp_path / "out")
    again = common.load_backbone(str(tmp_path / "out"))[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in vlm.state_dict().items())
    assert torch.equal(vlm.lm_head.weight, eagle.text.get_input_embeddings().weight)
    pixels = torch.from_numpy(processor.images(pictures(56))[0])
    with torch.no_grad():
        got = vlm.model.get_image_features(pixels, return_dict=True).pooler_output
        earlier = eagle.vision(pixels, output_hidden_states=True).hidden_states[-2]
        shuffle = transformers.InternVLModel.pixel_shuffle
        folded = shuffle(None, earlier.unflatten(1, (4, 4)), scale_factor=0.5)
        assert torch.allclose(got, eagle.mlp(folded.flatten(1, 2)), atol=1e-5)


@pytest.mark.parametrize("change, says", [
    ("without", "it lacks mlp1.1.weight"),
    ("surplus", "it has a surplus weight, language_model.model.extra.weight"),
    ("shape", "it has another shape of mlp1.1.weight"),
    ("cut", "is damaged or cut short"),
])  # fmt: skip
def test_an_eagle_weight_that_does_not_fit_is_named(change, says, eagle, tmp_path, capfd):
    folder = shutil.copytree(eagle.folder, tmp_path / "eagle")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["mlp1.1.weight"]
    tensors = load_file(file)
    if change == "without":
        tensors.pop("mlp1.1.weight")
    if change == "surplus":
        tensors["language_model.model.extra.weight"] = torch.zeros(2)
    if change == "shape":
        tensors["mlp1.1.weight"] = torch.zeros(3, 3)
    save_file(tensors, file, {"format": "pt"})
    if change == "cut":
        file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(common.UserError, match=re.escape(says)) as error:
        common.load_backbone(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert "".join(capfd.readouterr()) == ""


def test_eagle_trains_and_acts_in_dualvla(eagle, episodes):
    cfg = replace(dualvla.Config(), **SMALL, backbone=str(eagle.folder), horizon=4, queries=4,
                  rank=4, repeats=2, talk=3, events="phase")  # fmt: skip
    cfg.explicit = ()
    for stage in ("expert", "dual"):
        where = {name: Path("nowhere") / name for name in dualvla.ORDER}
        cfg = dualvla.staged(cfg, stage, where)
        model, processor = dualvla.build(cfg, 8, 7)
        stats = data.statistics(episodes)
        samples = dualvla.Samples(episodes, stats, cfg, dualvla.keep_labels(episodes, cfg))
        rows = [samples.get(t, np.random.default_rng(0)) for t in (5, 25)]
        rows += data.question_sets(["pope"], 2)["pope"] if cfg.mix else []
        noise = dualvla.draw_noise(cfg, 0, 7, ALONE)
        losses = model(dualvla.collate(rows, cfg, processor), noise)
        dualvla.total_loss(losses, cfg).backward()
        grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert any(".up.0" in n for n in grads) and not any("vision_tower" in n for n in grads)
        policy = dualvla.Policy(model, cfg, processor, {"tabletop": stats}, ALONE.device)
        looks = [{"images": {k: v[0] for k, v in e.images.items()}, "state": e.state[0]}
                 for e in episodes[:2]]  # fmt: skip
        plans = policy.act(looks, ["go", "put it there"], np.random.default_rng(0))
        assert plans.shape == (2, 4, 7) and np.isfinite(plans).all()


def test_eagle_acts_in_the_other_two(eagle, episodes):
    looks = [{"images": {k: v[0] for k, v in e.images.items()}, "state": e.state[0], "memory": {}}
             for e in episodes[:2]]  # fmt: skip
    stats, rng = data.statistics(episodes), np.random.default_rng(0)
    for script in (twinbrain, vita_vla):
        cfg = replace(script.Config(), **SMALL, backbone=str(eagle.folder))
        cfg = replace(cfg, **({"stage": "finetune"} if script is vita_vla else {"state": True}))
        model, processor = script.build(cfg, *(() if script is vita_vla else (8, 7)))
        policy = script.Policy(model.eval(), cfg, processor, {"tabletop": stats}, ALONE.device)
        plans = policy.act(looks, ["go", "put it there"], rng)
        assert np.isfinite(plans).all() and plans.shape[::2] == (2, 7)
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert all("vision_tower" in n or "projector" in n for n in fixed) and fixed


def test_vita_1_5_is_refused_where_its_head_is_needed():
    with pytest.raises(common.UserError, match="only vita_vla.py takes it"):
        common.load_backbone("VITA-1.5")


# --- export ---------------------------------------------------------------------------------------


def trained(script, folder, episodes, backbone="tiny", **flags):
    """A run folder of a model whose every trained weight has moved -> the model, its processor."""
    cfg = replace(script.Config(), **SMALL, backbone=str(backbone), **flags)
    model, processor = script.build(cfg, *(() if script is vita_vla else (8, 7)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    meta = {"method": script.__name__, "config": asdict(cfg)}
    meta["robots"] = {"tabletop:bridge": data.statistics(episodes)}
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith("left.")}
    common.save_checkpoint(folder / "checkpoints", 1, tensors, {}, {}, meta, ALONE)
    return model.eval(), processor


def plain_logits(folder, images, question):
    """A checkpoint asked through the library alone -> ids, logits (T, V)."""
    vlm = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = backbones.Processor(folder, vlm.config)
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    pixels, grids = processor.images(images)
    ids = torch.tensor([processor.prompt("Help.", question, grids)[0]])
    with torch.no_grad():
        logits = vlm(
            input_ids=ids, pixel_values=torch.from_numpy(pixels),
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=(ids == processor.image_token_id).int(),
        ).logits[0]  # fmt: skip
    return ids, logits, (processor, pixels, grids)


def our_logits(vlm, ids, processor, pixels, grids):
    prompt = processor.pad(ids.tolist(), [grids])
    with torch.no_grad():
        h = vlm.model(
            inputs_embeds=vlm.get_input_embeddings()(ids), position_ids=prompt["position_ids"],
            attention_mask=common.causal_mask(prompt["real"]),
            pixel_values=torch.from_numpy(pixels), image_grid_thw=torch.tensor(grids),
        ).last_hidden_state  # fmt: skip
        return vlm.lm_head(h)[0]


@pytest.mark.parametrize("flags", [
    {}, dict(deepstack=False), dict(head="fast", brain="vanilla"), dict(lora=2),
])  # fmt: skip
def test_the_exported_right_brain_answers_as_it_does(flags, episodes, tmp_path, capsys):
    model, _ = trained(twinbrain, tmp_path / "run", episodes, **flags)
    if "head" in flags:  # its action words' byte pairs are the run's, not the checkpoint's
        meta = next(tmp_path.glob("run/checkpoints/*/meta.json"))
        windows = data.Windows(episodes, data.statistics(episodes), 8)
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        fast = common.Fast.fit(windows.chunks(7), tokenizer).state
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"fast": fast}))
    twinbrain.main(["--export", str(tmp_path / "run")])
    out = tmp_path / "run" / "export"
    assert f"from_pretrained('{out}') loads it" in capsys.readouterr().out
    ids, logits, rest = plain_logits(out, pictures(64, 32), "\nWhat is red?")
    assert torch.allclose(logits, our_logits(model.right, ids, *rest), atol=1e-4)
    _, before, _ = plain_logits(TINY, pictures(64, 32), "\nWhat is red?")
    assert not torch.allclose(logits, before, atol=0.1)
    assert "_attn_implementation" not in (out / "config.json").read_text()
    assert (out / "preprocessor_config.json").read_text() == (
        TINY / "preprocessor_config.json"
    ).read_text()
    with pytest.raises(common.UserError, match="is not empty: another --out"):
        twinbrain.main(["--export", str(tmp_path / "run")])


@pytest.mark.parametrize("lora", [0, 2])
def test_the_exported_student_reads_as_it_does(lora, episodes, tmp_path):
    model, _ = trained(vita_vla, tmp_path / "run", episodes, stage="finetune", lora=lora)
    vita_vla.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    vlm, _ = common.load_backbone(str(tmp_path / "out"))
    common.merge_lora(model.vlm)
    kept = model.vlm.model.state_dict()
    assert all(torch.equal(kept[n], t) for n, t in vlm.model.state_dict().items())
    assert vlm.lm_head.weight is vlm.get_input_embeddings().weight
    fresh = common.load_backbone("tiny")[0].model.state_dict()
    moved = "language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(fresh[moved], kept[moved])


def test_a_teacher_has_nothing_to_export(episodes, tmp_path):
    trained(vita_vla, tmp_path / "run", episodes, stage="teacher")
    with pytest.raises(common.UserError, match="a teacher has no VLM; name a student's run"):
        vita_vla.main(["--export", str(tmp_path / "run")])


def test_the_exported_specialist_has_its_expert_merged(episodes, tmp_path):
    flags = dict(rank=4, queries=4, horizon=4)
    model, _ = trained(dualvla, tmp_path / "run", episodes, stage="expert", **flags)
    model.gates.now = torch.ones(1, 1, 1)
    dualvla.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    ids, logits, rest = plain_logits(tmp_path / "out", pictures(64, 32), "\nWhat is red?")
    assert torch.allclose(logits, our_logits(model.vlm, ids, *rest), atol=1e-3)
    model.gates.now = None  # without its expert it would be another model
    assert not torch.allclose(logits, our_logits(model.vlm, ids, *rest), atol=0.1)


def test_gated_experts_are_not_exported_as_if_they_were_one(episodes, tmp_path):
    trained(dualvla, tmp_path / "run", episodes, stage="dual", rank=4, queries=4, horizon=4)
    with pytest.raises(common.UserError, match="weighted anew for each token") as error:
        dualvla.main(["--export", str(tmp_path / "run")])
    assert "\n" not in str(error.value)
    full = dict(stage="dual", tune="full", queries=4, horizon=4)
    model, _ = trained(dualvla, tmp_path / "full", episodes, **full)
    dualvla.main(["--export", str(tmp_path / "full"), "--out", str(tmp_path / "out")])
    ids, logits, rest = plain_logits(tmp_path / "out", pictures(64, 32), "\nWhat is red?")
    assert torch.allclose(logits, our_logits(model.vlm, ids, *rest), atol=1e-4)


def test_eagle_is_exported_in_its_released_layout(eagle, episodes, tmp_path):
    flags = dict(stage="expert", rank=4, queries=4, horizon=4)
    model, _ = trained(dualvla, tmp_path / "run", episodes, eagle.folder, **flags)
    dualvla.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    index = json.loads((eagle.folder / "model.safetensors.index.json").read_text())
    assert names == {n for n in index["weight_map"] if ".head." not in n}
    vlm, processor = common.load_backbone(str(tmp_path / "out"))
    assert "<robot_action_255>" in processor.tokenizer.get_vocab()
    pixels, grids = processor.images(pictures(56))
    ids = torch.tensor([processor.prompt("", "Go", grids)[0]])
    model.gates.now = torch.ones(1, 1, 1)
    both = [our_logits(m, ids, processor, pixels, grids) for m in (vlm, model.vlm)]
    assert torch.allclose(*both, atol=1e-3) and both[0].shape[-1] == len(processor.tokenizer)
