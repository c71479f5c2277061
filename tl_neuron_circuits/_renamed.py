"""Names that this package had before 0.1.0 and what they are now; docs/migration.md lists them for readers."""

SINCE = "0.1.0"

RENAMED: dict[str, str] = {
    "Agreement": "tnc.PatchingAgreement",
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
    "evaluation.Agreement": "tnc.evaluation.PatchingAgreement",
    "evaluation.GroundTruth": "tnc.components.GroundTruth",
    "evaluation.agreement": "tnc.evaluation.compare_with_patching",
    "evaluation.edge_auroc": "tnc.components.GroundTruth.auroc",
    "evaluation.edge_average_precision": "tnc.components.GroundTruth.average_precision",
    "evaluation.edge_precision_recall": "tnc.components.GroundTruth.precision_recall",
    "evaluation.interpbench_ground_truth": "tnc.components.interpbench_ground_truth",
    "evaluation.judge_edges": "tnc.components.judge_edges",
    "evaluation.structural_hamming_distance": "tnc.components.GroundTruth.shd",
    "evaluation.tracr_ground_truth": "tnc.components.tracr_ground_truth",
    "explain.LogitEffects": "tnc.interventions.DirectLogitEffects",
    "explain.StrongestExamples": "tnc.explain.MaxActivatingExamples",
    "explain.logit_effects": "tnc.interventions.direct_logit_effects",
    "explain.strongest_examples": "tnc.explain.max_activating_examples",
    "interventions.transplant": "tnc.interventions.interchange",
    "lasso.Generalisation": "tnc.lasso.Generalization",
    "lasso.LabelledTexts": "tnc.lasso.LabeledTexts",
    "lasso.generalise": "tnc.lasso.generalize",
    "models.load_demo_model": "tnc.load_demo_model",
    "plots.plot_circuit": "the method tnc.Circuit.plot",
    "plots.plot_comparison": "the method tnc.Comparison.plot",
    "plots.plot_pareto": "the method tnc.transcoders.ParetoFront.plot",
    "plots.plot_sweep": "the method tnc.SteeringSweep.plot",
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
