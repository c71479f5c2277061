"""The Bias-in-Bios protocol on synthetic biographies that demo-gelu understands: a table over seeds, in one run.

    python -m tests.benchmarks.biographies [--seeds 3] [--texts 800] [--layer 1] [--no-errors] [--out results.csv]
    python -m tests.benchmarks.biographies --bios DIR --model gpt2 --saes DIR    the real one, for who has its files

A biography is a sentence about people of a profession, and often another about where someone lives. Label: which of
two professions. Spurious attribute: whether it is about one person or several, which shows in
noun and verb and is what this model (trained to agree verbs) represents best. In the biased texts all of one profession
are several, all of the other one. Concept texts: the same sentences about other people (parents, dogs, kings).
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_neuron_circuits as tnc
from tl_neuron_circuits.demo import _text
from tl_neuron_circuits.lasso import LabeledTexts, generalize
from tl_neuron_circuits.lasso._generalization import Generalization
from tl_neuron_circuits.tasks import _english as english
from tl_neuron_circuits.tasks._agreement import agreement_prompt

PROFESSIONS = ("farmer", "doctor")
OTHERS = ("boy", "girl", "child", "parent", "friend", "brother", "sister", "king", "dog", "cat", "horse", "guard")


def biographies(n: int, seed: int, concept: bool = False) -> LabeledTexts:
    """`n` texts, label and attribute drawn independently; with `concept` about people of no profession."""
    chance = _text.Chance(seed)
    nouns = {noun.singular: noun for noun in english.NOUNS}
    texts, labels, spurious = [], [], []
    for _ in range(n):
        label, several = chance.below(2), chance.below(2)
        subject = nouns[chance.pick(OTHERS) if concept else PROFESSIONS[label]]
        other, verb = chance.pick(english.NOUNS), chance.pick(english.FINITE_VERBS)
        start = agreement_prompt(
            chance.pick(("simple", "nounpp")), subject, bool(several), other, bool(chance.below(2)),
            verb=chance.pick(english.TRANSITIVE_VERBS), preposition=chance.pick(english.PREPOSITIONS),
        )  # fmt: skip
        text = f"{start} {verb.form(bool(several))} {chance.pick(_text.COMPLEMENTS[verb.singular])}."
        texts.append(f"{text} {_text.city_sentence(chance)}" if chance.below(2) else text)
        labels.append(label)
        spurious.append(several)
    return LabeledTexts(texts, labels, spurious)


def synthetic(options: argparse.Namespace, seed: int, model: Any, basis: Any) -> Generalization:
    given = [biographies(options.texts, 10 * seed + k, concept=k == 2) for k in range(3)]
    return generalize(model, *given, basis, seed=seed, batch_size=64, **settings(options))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {"hook": options.hook, "errors": not options.no_errors, "judge": options.judge}


def real(options: argparse.Namespace, seed: int, model: Any, basis: Any) -> Generalization:
    texts = LabeledTexts.from_bias_in_bios(options.bios)
    rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    train, test = texts.take(rows[: len(rows) // 2]), texts.take(rows[len(rows) // 2 :])
    other = LabeledTexts.from_bias_in_bios(options.bios, ("teacher", "journalist")).balanced(options.texts, seed)
    return generalize(model, train, test, other, basis, seed=seed, **settings(options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=800)
    parser.add_argument("--layer", type=int, default=1, help="whose SAE is used; -1 for all of them")
    parser.add_argument("--hook", default=None, help="where the probe reads; where the last dictionary writes")
    parser.add_argument("--judge", type=float, default=0.6, help="AUROC on the concept texts from which on it ablates")
    parser.add_argument("--no-errors", action="store_true", help="the probe reads reconstructions")
    parser.add_argument("--bios", type=Path, default=None, help="Bias in Bios as JSONL, CSV or Parquet")
    parser.add_argument("--model", default="demo-gelu", help="with --bios: what TransformerBridge can load")
    parser.add_argument("--saes", type=Path, default=None, help="with --bios: SAELens folders of that model")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.bios is None:
        model = tnc.load_demo_model()
        saes = tnc.load_demo_dictionaries("sae")
        saes = saes if options.layer < 0 else [saes[options.layer]]
    else:
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(options.model)
        saes = [tnc.load_dictionary(path) for path in sorted(options.saes.iterdir()) if path.is_dir()]
    basis = tnc.bases.Dictionaries(saes)
    tables = []
    for seed in range(options.seeds):
        found = (synthetic if options.bios is None else real)(options, seed, model, basis)
        print(found, found.settings)
        if seed == 0:
            for ranking, table in found.candidates.items():
                print(ranking, table.head(12).round(3).to_string(), sep="\n")
        tables.append(found.table.assign(seed=seed))
    table = pd.concat(tables)
    print(summary(table).to_string())
    if options.out is not None:
        table.to_csv(options.out, index=False)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds."""
    groups = table.drop(columns="seed").groupby("method", sort=False)
    mean, spread = groups.mean(), groups.std()
    return pd.DataFrame(
        {c: [f"{m:.3f} +- {s:.3f}" for m, s in zip(mean[c], spread[c], strict=True)] for c in mean}, mean.index
    )


if __name__ == "__main__":
    main()
