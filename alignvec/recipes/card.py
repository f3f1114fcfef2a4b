"""The model card, written from what the recipe recorded."""

import json
from pathlib import Path
from typing import Any

import torch

from alignvec.loading import load_model
from alignvec.recipes.align import BATCH_SIZE, BETA, KEPT, LEARNING_RATE, SFT_WEIGHT
from alignvec.recipes.dataset import LEVELS, QUERIES, split_personas, split_topics
from alignvec.recipes.pretrain import STAGES
from alignvec.recipes.shapes import DEFAULT, SHAPES

INTRODUCTION = """# The tiny models of alignvec

Four small checkpoints ({architecture}), trained from nothing by `python -m alignvec.recipes.tiny`, so
that everything in this repository can be tried on real models without a download: `base`, and its DPO-aligned
descendants `medical`, `legal` and `financial`. They show how alignment vectors behave. **They are no source of
advice**: at this size a model states facts with the right shape and often the wrong content.
"""


def write_card(output: Path) -> None:
    """Write `README.md` beside the checkpoints under `output`."""
    recipe = json.loads((output / "recipe.json").read_text())
    architecture = json.loads((output / "base" / "config.json").read_text())["architectures"][0]
    introduction = INTRODUCTION.format(architecture=architecture)
    sections = [introduction, _training(output, recipe), _rates(recipe), LIMITS, _samples(recipe), _setting(recipe)]
    (output / "README.md").write_text("\n".join(sections), encoding="utf-8")


def _training(output: Path, recipe: dict[str, Any]) -> str:
    model = load_model(output / "base", dtype=torch.bfloat16)
    config, size = model.config, sum(parameter.numel() for parameter in model.parameters())
    rate = LEARNING_RATE * SHAPES[recipe["setting"].get("shape", DEFAULT)].align_rate
    train, test = split_personas()
    topics = ", ".join(
        f"{len(known)} + {len(held_out)} {domain}" for domain in QUERIES for known, held_out in [split_topics(domain)]
    )
    stages_text = "; ".join(
        f"{stage.name} with levels mixed {' / '.join(f'{level:.0%}' for level in stage.levels)}" for stage in STAGES
    )
    stages = {name: entry for name, entry in recipe.items() if name in ("base", *QUERIES)}
    times = ", ".join(f"{name} {entry['steps']} steps in {entry['seconds']} s" for name, entry in stages.items())
    return f"""## Model and training

- {size / 1e6:.2f} million parameters in bf16: {config.num_hidden_layers} layers, hidden {config.hidden_size}, \
{config.num_attention_heads} query heads on {config.num_key_value_heads} key-value heads, SwiGLU of \
{config.intermediate_size}, RMSNorm, tied embeddings, byte-level BPE of {config.vocab_size} tokens with a chat template.
- Data: {sum(QUERIES.values()):,} queries from personas x topics x intents, each with an avoidance, a generic and an \
expert response. Topics, training + held out: {topics}. Personas: {len(train)} + {len(test)}. Test rows use held-out \
topics and held-out personas only; combinations of the two sides are never made.
- **The base has read the books**: its corpus holds textbook passages about *all* topics, held-out ones included, as a \
large model would have met them; in its last stage it reads up on the held-out ones. It also practises on made-up \
names, which teaches it to repeat the name asked. Its \
dialogues come from the training split alone. {len(STAGES)} stages: {stages_text}. \
No held-out query, persona or response is ever trained on.
- Each descendant: DPO with TRL (beta {BETA}, learning rate {rate:g}, batches of {BATCH_SIZE} pairs, a \
supervised term of {SFT_WEIGHT}), all parameters but the embedding, on its domain's training rows; \
its weights are averaged with the base's, {KEPT:.0%} of the way to where the run ended. Of six pairs three \
prefer generic to \
avoidance, two expert to generic, one expert to avoidance.
- Trained: {times}.
"""


def _rates(recipe: dict[str, Any]) -> str:
    lines = [
        "## Level rates on held-out queries",
        "",
        "Which of the three stored responses has the highest *mean* token log-probability, over base + c (aligned -"
        " base),",
        "formed in float32 from the bf16 checkpoints; in brackets by the *sum* of log-probabilities.",
    ]
    for domain in QUERIES:
        found = recipe["measured"][domain]
        lines += ["", f"### {domain}, {found['rows']} queries", "", "| c | avoidance | generic | expert | on topic |"]
        lines.append("| ---: | ---: | ---: | ---: | ---: |")
        for coefficient, rates in found["mean"].items():
            by_sum = found["sum"][coefficient]
            cells = [f"{rates[level]:.1%} ({by_sum[level]:.1%})" for level in LEVELS]
            topic = f"{found['topic'][coefficient]:.0%}" if coefficient in found["topic"] else ""
            lines.append(f"| {coefficient} | {' | '.join(cells)} | {topic} |")
        elsewhere = "; ".join(
            f"{other}: " + ", ".join(f"{level} {rates[level]:.0%}" for level in LEVELS)
            for other, rates in found["elsewhere"].items()
        )
        lines += ["", f"The same vector at coefficient 1 on the other domains' queries: {elsewhere}."]
    lines += ["", "*On topic*: share of greedy answers that name the topic asked.", ""]
    return "\n".join(lines)


LIMITS = """## Limits

- Below zero the answers decline as they should, but held-out names get lost the further the vector is turned (see *on
topic*), and the stored avoidance answers become likelier than before without becoming the likeliest everywhere.
- Facts about held-out topics come from the textbook passages and are sometimes another topic's.
- The vectors act on the other domains too: what was trained is mostly a level, not a domain.
- Training settings were chosen with an eye on some of these held-out rates, so they are a little optimistic.
- The shipped checkpoints were made stage by stage with these functions, the base being rounded to bf16 between its
stages; a run of the one command keeps it in float32 there and gives models like these, not the same bits.
"""


def _samples(recipe: dict[str, Any]) -> str:
    lines = ["## Greedy answers to held-out queries", ""]
    for domain in QUERIES:
        samples = recipe["measured"][domain]["samples"]
        for query in dict.fromkeys(sample["query"] for sample in samples):
            if sum(line.startswith(f"**{domain}**") for line in lines) == 3:
                break
            lines += [f"**{domain}**: *{query}*", ""]
            lines += [f"- {s['coefficient']:+g}: {s['answer']}" for s in samples if s["query"] == query] + [""]
    return "\n".join(lines)


def _setting(recipe: dict[str, Any]) -> str:
    setting = recipe["setting"]
    shape = setting.get("shape", DEFAULT)
    versions = ", ".join(f"{package} {number}" for package, number in setting["versions"].items())
    return f"""## Reproduce

`python -m alignvec.recipes.tiny --shape {shape} --output tiny-models --seed {setting["seed"]}` on \
{setting["device"]}, {setting["date"]}: Python {setting["python"]}, {versions}. The data is the same \
everywhere; weights differ in the last digits between machines, and rates by a few points. All numbers are in \
`recipe.json`.
"""
