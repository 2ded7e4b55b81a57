"""Builds the backbone of this folder: a Qwen3-VL of two million parameters that knows a tabletop.

    python assets/tiny/make.py --minutes 65              # from nothing into runs/tiny, on two cores
    python assets/tiny/make.py --go-on --seed 1 --minutes 25 --peak 0.45     # one more stage there
    python assets/tiny/make.py --go-on --seed 2 --minutes 13 --peak 0.2 --mean   # the mean of both
    python assets/tiny/make.py --measure --out assets/tiny                   # what is shipped

accuracy.json records the stages that made the shipped weights (seven, 182 minutes: such a first one
stopped on the way, its learning rate still high, then such as the second, in the end the third) and
the accuracy on scenes that no training draws. The learning rate falls with the clock, so weights
made again are as good, not the same.

It learns to answer questions (worlds/questions.py) about random scenes (worlds/tabletop.py), from
nothing. What made it learn, in the order of importance: half of the samples list every thing with
its place; a picture comes with many questions at once; matrices are trained by Muon.

A sample is one prefix (system prompt, pictures) and several branches (question, answer) behind it:

    prefix  | question 1  answer 1 | question 2  answer 2 | ...
            `- each branch sees the prefix and itself, and counts its positions on from the prefix,

so that every branch is exactly the prompt of a single question, at a fraction of its cost.

Letters: B samples, T tokens, N images.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import distributed
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, Qwen3VLConfig, Qwen3VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import (  # noqa: E402
    Muon,
    attend,
    autocast,
    mrope_positions,
    patchify,
    quick_vision,
)
from worlds import tabletop  # noqa: E402
from worlds.questions import ASK, CELLS, FIRST_TEST_SEED, ask  # noqa: E402
from worlds.tabletop import COLOURS, FIXTURES, MOVABLES, TARGETS, Tabletop  # noqa: E402

SIZE, WRIST_SIZE, PATCH, MERGE = 64, 32, 8, 2
BATCH, QUESTIONS = 64, 8

# --------------------------------------------------------------------------------------------------
# the prompts of the scripts, word for word
# --------------------------------------------------------------------------------------------------
LEFT_SYSTEM = "You are a helpful robot brain that can understand images and texts."
RIGHT_SYSTEM = (
    "You are a helpful robot brain that can understand images, texts, and robot states.\n"
    "You will be provided with observation, an instruction, and the robot state. "
    "Take action to execute the instruction."
)
INSTRUCTION, ROBOT_TYPE, QUESTION = "\nInstruction: ", "\nRobot Type: ", "Question: "
PREDICT = (
    "\nPredict the next action for the robot based on the observation, instruction and robot type."
)
SYSTEM, USER = "<|im_start|>system\n", "<|im_start|>user\n"
ASSISTANT, END = "<|im_start|>assistant\n", "<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
ROBOTS = ["tabletop", "widowx", "franka", "libero", "calvin"]

# As in Qwen, but for one thing: a whole sentence of the templates above is one token. That cuts a
# prompt of about 110 tokens to about 50, and with it the time of everything that this model is in.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", SYSTEM, USER, ASSISTANT, END]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PLAIN = ["<|propri|>", "<|action|>", "🔍"]
PLAIN += [LEFT_SYSTEM, RIGHT_SYSTEM, INSTRUCTION, ROBOT_TYPE, PREDICT, QUESTION]
PLAIN += [f"<loc_{i}>" for i in range(CELLS)] + [f"<robot_action_{i}>" for i in range(256)]

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' or 'image' in part -%}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


# --------------------------------------------------------------------------------------------------
# tokenizer
# --------------------------------------------------------------------------------------------------
def sentences():
    """What the model will read: questions, answers, instructions, reasoning."""
    world, rng, texts = Tabletop(), random.Random(0), []
    for seed in range(1500):
        world.scatter(seed)
        for kind in ASK:
            question = ask(world, rng, kind)
            if question:
                texts += [question.question, question.answer]
    names = list(COLOURS) + list(MOVABLES + TARGETS + FIXTURES)
    texts += [form for word in names for form in (word, " " + word, f" {word}s")] * 50
    return texts + ROBOTS * 50 + [" " + s for s in ROBOTS] * 50 + tabletop.all_sentences()


def build_tokenizer(texts):
    """Byte-level BPE in which each word of the texts, with or without a space, is one token."""
    added = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    added += [AddedToken(t, special=False, normalized=False) for t in PLAIN]
    words = Regex(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s+")
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    small.train_from_iterator(texts, trainer)
    bpe = json.loads(small.to_str())["model"]
    # Merging letters up to whole words would fill the vocabulary with fragments. Instead the words
    # are entered directly, and ignore_merges makes an entered word win over its pieces.
    counts = Counter(word for text in texts for word in re.findall("[A-Za-z]+", text))
    vocab = dict(bpe["vocab"])
    for word, _ in counts.most_common(330):
        for form in (word, "Ġ" + word):  # Ġ is the space of byte-level vocabularies
            vocab.setdefault(form, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(m) for m in bpe["merges"]], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_tokens(added)
    return tokenizer


# --------------------------------------------------------------------------------------------------
# model
# --------------------------------------------------------------------------------------------------
def build_model(tokenizer, vocab_size):
    ids = tokenizer.token_to_id
    text = dict(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
        bos_token_id=ids("<|endoftext|>"),
        eos_token_id=ids(END),
        pad_token_id=ids("<|endoftext|>"),
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=3,
        hidden_act="gelu",  # exact: on a CPU five times faster than the tanh form of the large ones
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
        out_hidden_size=128,
        num_position_embeddings=(SIZE // PATCH) ** 2,
        deepstack_visual_indexes=[1],
    )
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return quick_vision(Qwen3VLForConditionalGeneration(config))


def save(model, tokenizer, out):
    """The folder as Hugging Face lays it out; weights in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    config = model.config.to_dict()
    del weights["lm_head.weight"]  # tied to the embeddings
    fresh = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config)).to(torch.bfloat16)
    fresh.load_state_dict(weights, strict=False)
    ids = tokenizer.token_to_id
    fresh.generation_config.eos_token_id = [ids(END), ids("<|im_end|>"), ids("<|endoftext|>")]
    fresh.generation_config.pad_token_id = ids("<|endoftext|>")
    fresh.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    write(
        out / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token=END,
        pad_token="<|endoftext|>",
        bos_token=None,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    write(
        out / "preprocessor_config.json",
        image_processor_type="Qwen2VLImageProcessor",
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_pixels=WRIST_SIZE**2,
        max_pixels=(4 * SIZE) ** 2,
        size={"shortest_edge": WRIST_SIZE**2, "longest_edge": (4 * SIZE) ** 2},
    )


def write(path, **values):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


# --------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------
def user_text(rng, question, system):
    """The user's words after the pictures."""
    if question.kind != "instruction":
        return QUESTION + question.question
    if rng.random() < (0.8 if system == RIGHT_SYSTEM else 0.2):
        return INSTRUCTION + question.question + ROBOT_TYPE + rng.choice(ROBOTS) + PREDICT
    return INSTRUCTION + question.question


def draw_questions(world, rng):
    """QUESTIONS questions, or one more: the places of things always, as they teach the most."""
    kinds = ["instruction", "caption" if rng.random() < 0.5 else "instruction"]
    kinds += [rng.choice(["point", "hand", "position"])]
    kinds += ["count", "colour", "shape"]  # the slowest to learn
    kinds += rng.sample(["exist", "relation", "choice", "yesno"], QUESTIONS - 6)
    kinds += ["lean"]  # where there is a button
    return [q for q in (ask(world, rng, kind) for kind in kinds) if q]


def draw_scene(worlds, rng, seed):
    """A random scene, or a moment of some task's execution."""
    if rng.random() < 0.7:
        return worlds[None], worlds[None].scatter(seed)["images"]
    world = worlds[rng.choice([s for s in worlds if s])]
    world.reset(seed, domain=rng.choice(tabletop.DOMAINS))
    expert = tabletop.Expert(world, seed=seed)
    for _ in range(rng.randrange(30)):
        world.step(expert.act())
    while not world.in_sight():  # a step later the hand hides something else, or nothing
        if world.success:
            return draw_scene(worlds, rng, f"{seed}+")
        world.step(expert.act())
    return world, world.observe()["images"]


def make_batch(tokenizer, worlds, first_seed, size=BATCH):
    """-> arrays ids, labels, branch (B, T), positions (3, B, T), pixels (patches, C), grids (N, 3),
    and for each row its questions."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    image_id, pad_id = (tokenizer.token_to_id(t) for t in ("<|image_pad|>", "<|endoftext|>"))
    rows, pixels, grids, asked = [], [], [], []
    for seed in range(first_seed, first_seed + size):
        rng = random.Random(f"questions-{seed}")
        world, images = draw_scene(worlds, rng, seed)
        shown = [images["static"], images["wrist"]][: rng.choice([1, 2])]
        pads = ""
        for image in shown:
            pixels.append(patchify(image, PATCH, MERGE))
            grids.append((1, image.shape[0] // PATCH, image.shape[1] // PATCH))
            n = grids[-1][1] * grids[-1][2] // MERGE**2
            pads += IMAGE.replace("<|image_pad|>", "<|image_pad|>" * n)
        system = rng.choice([None, None, LEFT_SYSTEM, RIGHT_SYSTEM])
        prefix = encode((SYSTEM + system + END if system else "") + USER + pads)
        positions = mrope_positions(prefix, grids[-len(shown) :], image_id, MERGE)
        row = [np.array([prefix, [-100] * len(prefix), [0] * len(prefix), *positions])]
        questions = draw_questions(world, rng)
        for branch, question in enumerate(questions, start=1):
            prompt = encode(user_text(rng, question, system) + END + ASSISTANT)
            answer = encode(question.answer + END)
            n = len(prompt) + len(answer)
            after = positions.max() + 1 + np.arange(n)
            labels = [-100] * len(prompt) + answer
            row.append(np.array([prompt + answer, labels, [branch] * n, after, after, after]))
        rows.append(np.concatenate(row, axis=1))  # (6, T of this row)
        asked.append(questions)
    empty = np.array([pad_id, -100, -1, 0, 0, 0])[:, None]
    batch = np.repeat(empty[:, None], max(r.shape[1] for r in rows), axis=2)
    batch = np.repeat(batch, size, axis=1)  # (6, B, T)
    for i, row in enumerate(rows):
        batch[:, i, : row.shape[1]] = row
    return *batch[:3], batch[3:], np.concatenate(pixels), np.array(grids), asked


def make_worlds():
    worlds = {None: Tabletop(size=SIZE, wrist_size=WRIST_SIZE)}
    for suite in tabletop.SUITES:
        worlds[suite] = Tabletop(suite, size=SIZE, wrist_size=WRIST_SIZE)
    return worlds


# --------------------------------------------------------------------------------------------------
# training and measuring
# --------------------------------------------------------------------------------------------------
def written_out(module, q, k, v, mask, scaling=None, **_):
    """Attention for prompts as short as these, on a CPU: see `common.attend`."""
    return attend(q, k, v, mask, scaling).transpose(1, 2), None


AttentionInterface.register("written out", written_out)


def answer_logits(model, batch):
    """-> logits and targets at the answers' tokens, and the row and branch of each."""
    ids, labels, branch, positions, pixels, grids = (torch.from_numpy(x) for x in batch[:6])
    before = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    mask = (before & same)[:, None]  # (B, 1, T, T)
    model.model.language_model.config._attn_implementation = "written out"
    with autocast(torch.device("cpu")):
        h = model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            pixel_values=pixels,
            image_grid_thw=grids,
            use_cache=False,
        ).last_hidden_state  # (B, T, 128)
        rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        logits = model.lm_head(h[rows, columns])
    return logits.float(), labels[rows, columns + 1], rows, branch[rows, columns]


def mean_loss(logits, targets, rows, branches):
    """Cross entropy in which a long answer counts more than a short one, but not in proportion."""
    owner = rows * (branches.max() + 1) + branches
    weights = owner.bincount()[owner] ** -0.5
    return (cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()


@torch.no_grad()
def measure(model, tokenizer, batches=8):
    """Accuracy of each kind of question on scenes that training never draws, and how many of each
    were asked (of captions, tokens)."""
    worlds, right = make_worlds(), defaultdict(list)
    names = {tokenizer.token_to_id(f"<loc_{i}>"): i for i in range(CELLS)}
    for i in range(batches):
        *batch, asked = make_batch(tokenizer, worlds, 2 * FIRST_TEST_SEED + i * BATCH)
        logits, targets, rows, branches = answer_logits(model, batch)
        guesses = logits.argmax(-1)
        for row, questions in enumerate(asked):
            for branch, question in enumerate(questions, start=1):
                mine = (rows == row) & (branches == branch)
                score(right, question.kind, guesses[mine].tolist(), targets[mine].tolist(), names)
    accuracy = {kind: round(float(np.mean(values)), 4) for kind, values in sorted(right.items())}
    return accuracy, {kind: len(right[kind]) for kind in accuracy}


def score(right, kind, guess, target, cells):
    """Answers count if every token is right; captions token by token; places within one cell."""
    if kind == "caption":
        for g, t in zip(guess, target):
            right["caption places" if t in cells else "caption"].append(
                abs(cells.get(g, 99) - cells[t]) <= 1 if t in cells else g == t
            )
    elif kind in ("point", "instruction") or kind == "hand" and target[0] in cells:
        label = kind if kind != "hand" else "hand place"
        near = [abs(cells.get(g, 99) - cells[t]) <= 1 for g, t in zip(guess, target) if t in cells]
        right[label].append(all(near))
    else:
        right[kind].append(guess == target)


def optimizers(model):
    inner = [n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    named = dict(model.named_parameters())
    muon = Muon([named[n] for n in inner], lr=0.02, weight_decay=0.1)
    rest = [p for n, p in named.items() if n not in inner]
    return [muon, torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)]


def train(rank, workers, args):
    """One of the workers: each makes its own share of a batch, and gradients are averaged."""
    began = time.time()
    torch.set_num_threads(1)
    meeting = f"file://{args.out.resolve()}/.meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    tokenizer, worlds = Tokenizer.from_file(str(args.out / "tokenizer.json")), make_worlds()
    model, step, losses = load(args.out), 0, []
    before = [p.detach().clone() for p in model.parameters()]
    if args.compile:
        for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
            block.forward = torch.compile(block.forward, dynamic=True)
    opts, share, saved = optimizers(model), BATCH // workers, time.time()
    while True:
        # Warm up, hold, and fall to zero over the last 75% of the time; all workers read one clock.
        done = torch.tensor((time.time() - began) / (60 * args.minutes))
        distributed.broadcast(done, 0)
        if done >= 1:
            break
        scale = args.peak * min(1.0, (step + 1) / 50, (1 - done.item()) / 0.75)
        for opt, base in zip(opts, (0.02, 3e-3)):
            opt.param_groups[0]["lr"] = base * scale
        first = args.seed * 10_000_000 + step * BATCH + rank * share
        *batch, _ = make_batch(tokenizer, worlds, first, share)
        loss = mean_loss(*answer_logits(model, batch))
        loss.backward()
        average_gradients(model, workers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
        step += 1
        if rank == 0 and step % 50 == 0:
            spent = (time.time() - began) / 60
            print(f"step {step:5d}  {spent:5.1f} min  loss {np.mean(losses[-50:]):.4f}", flush=True)
        if rank == 0 and time.time() - saved > 240:
            print(measure(model, tokenizer, batches=2)[0], flush=True)
            save(model, tokenizer, args.out)
            saved = time.time()
    if args.mean:
        for p, old in zip(model.parameters(), before):
            p.data.lerp_(old, 0.5)
    if rank == 0:
        save(model, tokenizer, args.out)
        minutes = round((time.time() - began) / 60, 1)
        stage = dict(minutes=minutes, seed=args.seed, steps=step, batch=BATCH, peak=args.peak)
        report(args, stage | ({"mean": True} if args.mean else {}))
    distributed.destroy_process_group()


def average_gradients(model, workers):
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    distributed.all_reduce(flat)
    for g, new in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(new.view_as(g) / workers)


def load(folder):
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return quick_vision(model)


def report(args, stage=None):
    """Measures what was saved, and writes it down with how it was made."""
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    model, path, stages = load(args.out), args.out / "accuracy.json", []
    accuracy, asked = measure(model, tokenizer, batches=300)  # a few minutes
    print(json.dumps(accuracy, indent=2))
    if (args.go_on or args.measure) and path.exists():
        stages = json.loads(path.read_text())["stages"]
    stages += [stage] if stage else []
    parameters = model.num_parameters()
    write(path, parameters=parameters, stages=stages, accuracy=accuracy, questions=asked)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=65.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, default=1.0, help="scales both learning rates")
    parser.add_argument("--workers", type=int, default=2, help="processes, best one for each core")
    parser.add_argument("--measure", action="store_true", help="only the accuracy of --out")
    parser.add_argument("--mean", action="store_true", help="of the weights before and after")
    parser.add_argument("--compile", action="store_true", help="a third faster; needs a C compiler")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--go-on", action="store_true", help="start from the weights in --out")
    args = parser.parse_args()
    if (args.go_on or args.measure) and not (args.out / "model.safetensors").exists():
        parser.error(f"--out {args.out} has no weights to start from or to measure")
    if args.measure:
        return report(args)
    if args.minutes <= 0:
        parser.error("--minutes: more than 0")
    torch.manual_seed(args.seed)
    if not args.go_on:
        tokenizer = build_tokenizer(sentences())
        model = build_model(tokenizer, tokenizer.get_vocab_size())
        save(model, tokenizer, args.out)
        print(f"{model.num_parameters():,} parameters, {tokenizer.get_vocab_size()} tokens")
    (args.out / ".meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train, (args.workers, args), nprocs=args.workers)
    (args.out / ".meeting").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
