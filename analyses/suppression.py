"""Do the units with the lowest scores matter least? Zeroes the lowest, random and highest and reads held-out facts.

Known facts are drawn by the seed and split: some are attributed, others are read while the units chosen by those scores
are zeroed, with plain prose beside them. Every ranking is shown: signed and magnitude, layer by layer and global.
Publishes `figures/suppression.*`; a second start does only what is missing.

    python analyses/suppression.py            # the full test
    python analyses/suppression.py --smoke    # the same way on few facts and steps, for tests
"""

import argparse
from pathlib import Path

import workbench as wb
from workbench.facts import general_text
from workbench.figures import suppression_curves
from workbench.reporting import places, publish
from workbench.results import digest_of, provenance
from workbench.suppression import suppression_curve

HERE = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> Path:
    """Run the test, publish its figure, and give the path of the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default's name, folder, .gguf file or hub id")
    parser.add_argument("--facts", default="world", help="facts of which those that the model knows are taken")
    parser.add_argument("--asked", type=int, default=300, help="at most so many facts are asked")
    parser.add_argument("--attributed", type=int, default=40, help="known facts that choose the units, half at most")
    parser.add_argument("--read", type=int, default=60, help="at most so many of the other known facts are read")
    parser.add_argument("--quotas", type=float, nargs="+", default=[0.5, 1, 3], help="zeroed units in percent")
    parser.add_argument("--unit", choices=["node", "neuron"], default="node")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of prose that are read")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; random units have three seeds from it on")
    parser.add_argument("--out", type=Path, help="folder of the results; in runs when not given")
    parser.add_argument("--figures", type=Path, help="where the figure is published")
    parser.add_argument("--smoke", action="store_true", help="one quota, one step of attribution, little prose")
    options = parser.parse_args(arguments)
    options.out, options.figures = places(HERE, "suppression", options.out, options.figures, options.smoke)
    if options.smoke:
        options.quotas, options.tokens = [10.0], 64
    model, seed = wb.load_model(options.model), options.seed
    facts = wb.load_facts(options.facts).at_most(options.asked, seed)
    asked = wb.recall(model, facts, progress=True)
    chosen, others = facts.filter(ids=asked.index[asked["known"]], name="known").apart(options.attributed, seed)
    read = others.at_most(options.read, seed)
    steps = 1 if options.smoke else None
    place = options.out / f"scores-{options.unit}-{chosen.digest[:12]}.zarr"
    scores = wb.attribute(model, chosen, unit=options.unit, steps=steps, out=place)
    parts = options.out / f"parts-{digest_of([chosen.digest, read.digest, options.quotas, options.tokens, seed])[:12]}"
    frame = suppression_curve(
        model, scores, read, quotas=options.quotas, seeds=(seed, seed + 1, seed + 2), general=general_text(),
        max_tokens=options.tokens, seed=seed, parts=parts, progress=True,
    )  # fmt: skip
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "figures")}
    settings |= {name: Path(settings[name]).name for name in ("model", "facts")}  # no folders of this machine
    about = {**provenance(), "settings": settings, "n_attributed": len(chosen), "n_read": len(read)}
    written = publish(suppression_curves(frame), frame, "suppression", options.figures, about)
    told = ["strategy", "score", "group", "quota", "metric", "before", "after", "change", "low", "high"]
    print(frame.loc[frame["seed"].isna(), told].to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    return written[0]


if __name__ == "__main__":
    print(main())
