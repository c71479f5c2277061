"""Names that this package had before 0.1.0 and what they are now; docs/migration.md lists them for readers."""

SINCE = "0.1.0"

RENAMED: dict[str, str] = {
    "Agreement": "PatchingAgreement, which tnc.compare_with_patching returns",
    "TokenisedPairs": "tnc.TokenizedPairs",
    "agreement": "tnc.compare_with_patching",
    "attribution": "tnc.nodes (scores), tnc.components (edges of heads and MLPs) and tnc.circuits (direct effects)",
    "logit_effects": "tnc.direct_logit_effects",
    "strongest_examples": "tnc.max_activating_examples",
    "transplant": "tnc.interchange",
    # The old name meant attn.hook_z, which is not what "attention output" means in TransformerLens.
    "bases.AttentionOutputs": "tnc.bases.HeadOutputs (attn.hook_z), not AttentionBlockOutputs (hook_attn_out)",
    "bases.AttentionWrites": "tnc.bases.AttentionBlockOutputs (hook_attn_out)",
    "bases.load_demo_dictionaries": "tnc.load_demo_dictionaries",
    "evaluation.Agreement": "PatchingAgreement, which tnc.compare_with_patching returns",
    "evaluation.GroundTruth": "tnc.components.GroundTruth",
    "evaluation.agreement": "tnc.evaluation.compare_with_patching",
    "evaluation.edge_auroc": "tnc.components.GroundTruth.auroc",
    "evaluation.edge_average_precision": "tnc.components.GroundTruth.average_precision",
    "evaluation.edge_precision_recall": "tnc.components.GroundTruth.precision_recall",
    "evaluation.interpbench_ground_truth": "tnc.components.GroundTruth.from_interpbench",
    "evaluation.judge_edges": "tnc.components.judge_edges",
    "evaluation.structural_hamming_distance": "tnc.components.GroundTruth.shd",
    "evaluation.tracr_ground_truth": "tnc.components.GroundTruth.from_tracr",
    "explain.LogitEffects": "DirectLogitEffects, which tnc.direct_logit_effects returns",
    "explain.StrongestExamples": "MaxActivatingExamples, which tnc.max_activating_examples returns",
    "explain.logit_effects": "tnc.interventions.direct_logit_effects",
    "explain.strongest_examples": "tnc.explain.max_activating_examples",
    "interventions.transplant": "tnc.interventions.interchange",
    "lasso.Generalisation": "Generalization, which tnc.lasso.generalize returns",  # codespell:ignore
    "lasso.LabelledTexts": "tnc.lasso.LabeledTexts",
    "lasso.generalise": "tnc.lasso.generalize",  # codespell:ignore
    "models.load_demo_model": "tnc.load_demo_model",
    "plots.plot_circuit": "the method tnc.Circuit.plot",
    "plots.plot_comparison": "the method tnc.Comparison.plot",
    "plots.plot_pareto": "the method plot of what tnc.transcoders.pareto returns",
    "plots.plot_sweep": "the method plot of what tnc.sweep returns",
    "plots.plot_trust": "the method tnc.Comparison.plot_trust",
    "plots.write_page": "the method tnc.Circuit.to_html",
    "tasks.TokenisedPairs": "tnc.tasks.TokenizedPairs",
    "tasks.tokenise": "tnc.tasks.tokenize",
}
"""From a name below `tnc` to where it is now."""


def renamed(package: str, name: str) -> str | None:
    """Where the name went that `package` once had; None if it never had one of that name."""
    old = f"{package}.{name}".partition(".")[2]
    return f"tnc.{old} was renamed to {RENAMED[old]} ({SINCE}); see docs/migration.md" if old in RENAMED else None


_TOKENIZE = "tnc.tasks.tokenize(model, pairs, {}=...) in place of the pairs"
_METHOD = "the method's own option, as in method=tnc.{}"

RENAMED_ARGUMENTS: dict[tuple[str, str], str] = {
    ("attribute", "steps"): _METHOD.format("IntegratedGradients(steps=20)"),
    ("attribute", "rules"): _METHOD.format('RelP(rules=("ln", "half"))'),
    ("attribute", "stabilizer"): _METHOD.format("RelP(stabilizer=1e-6)"),
    ("attribute", "nodes"): _METHOD.format("Patching(frame)"),
    ("attribute", "seed"): _METHOD.format("Random(1)"),
    **{
        (function, name): _TOKENIZE.format(name)
        for function in ("attribute", "evaluate", "compare", "component_edges")
        for name in ("prepend_bos", "multi_token")
    },
    ("evaluate", "error"): 'error_nodes="rank" (before: "nodes"), "keep" or "ablate"',
    ("compare", "error"): 'error_nodes="rank" (before: "nodes"), "keep" or "ablate"',
    ("trace", "share"): "nodes=tnc.ByShare(0.005)",
    ("trace", "mass"): "nodes=tnc.ByMass(0.8)",
    ("component_edges", "threshold"): "method=tnc.components.ACDC(0.01)",
    ("component_edges", "steps"): 'method="eap_ig_inputs(steps=5)"',
    ("CircuitLasso", "share"): "penalty=tnc.lasso.Share(0.2)",
    ("CircuitLasso", "n_edges"): "penalty=tnc.lasso.MostEdges(40)",
    ("CircuitLasso", "folds"): "penalty=tnc.lasso.HeldOut(4)",
    ("CircuitLasso", "attention"): 'nodes=tnc.lasso.Components(attention="layers")',
    ("CircuitLasso", "mlp"): 'nodes=tnc.lasso.Components(mlp="neurons")',
    ("CircuitLasso", "basis"): "nodes=",
    ("profiles", "goals"): "targets=",
    ("capitals", "vocabulary"): "tnc.demo.capitals(), which has no vocabulary",
}
"""From a function's argument to what is written now."""


def renamed_argument(function: str, name: str) -> str | None:
    """What is written now for an argument that `function` once had; None if it never had one of that name."""
    return RENAMED_ARGUMENTS.get((function, name))
