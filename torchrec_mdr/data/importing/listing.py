"""What a preparation prints: what each column was taken for, the splits, and what looks wrong."""

from __future__ import annotations

from tabulate import tabulate

from torchrec_mdr.data.features import DensePlan, SparsePlan
from torchrec_mdr.data.importing.decide import Decision
from torchrec_mdr.data.importing.prepare import Imported
from torchrec_mdr.data.schema import SPLITS

_MOST_NAMES = 5


def listing(imported: Imported) -> str:
    """All of it as text."""
    schema, plan = imported.schema, imported.decision.plan
    lines = [column_table(imported.decision), ""]
    lines.append("rows: " + ", ".join(f"{split} {schema.rows[split]:,}" for split in SPLITS))
    for division in plan.divisions:
        names = ", ".join(division.names[:_MOST_NAMES]) + (", ..." if len(division.names) > _MOST_NAMES else "")
        lines.append(f"division {division.name}: {len(division.names):,} domains ({names})")
    lines += [f"warning: {warning}" for warning in imported.warnings]
    return "\n".join(lines)


def column_table(decision: Decision) -> str:
    """A line for each raw column: what it was taken for, and what became of it."""
    return tabulate(column_lines(decision), headers=["column", "kind", "becomes"], disable_numparse=True)


def column_lines(decision: Decision) -> list[list[str]]:
    """The lines of :func:`column_table`."""
    plan = decision.plan
    lines = []
    for column in decision.columns:
        sparse = [feature for feature in plan.sparse if feature.column == column.name]
        dense = [feature for feature in plan.dense if feature.column == column.name]
        if column.name in plan.left_out and not sparse and not dense:
            lines.append([column.name, "left out", plan.left_out[column.name]])
        else:
            told = [_sparse(feature, decision) for feature in sparse] + [_dense(feature) for feature in dense]
            lines.append([column.name, column.kind, "; ".join(told)])
    makers = [(name, "label") for name in plan.label_columns()] + ([(plan.weight, "weight")] if plan.weight else [])
    known = {column.name for column in decision.columns}
    rule = plan.label.rule or f"1 is positive, {plan.label.negative} negative"
    told_of = {"label": rule, "weight": f"mean {plan.weight_mean:.4g} in training rows becomes 1"}
    return [[name, kind, told_of[kind]] for name, kind in makers if name not in known] + lines


def _sparse(feature: SparsePlan, decision: Decision) -> str:
    if feature.kind == "time":
        return str(feature.part)
    many = f", lists of up to {feature.max_length}, {feature.pooling}" if feature.kind == "list" else ""
    if feature.vocabulary is None:
        return f"{feature.num_embeddings:,} ids by hash{many}"
    kept = decision.plan.vocabularies.sizes[feature.vocabulary]
    all_of = decision.known[feature.vocabulary]
    rare = f" of {all_of:,}, the others are unknown" if kept < all_of else ""
    shared = f", vocabulary of {feature.vocabulary}" if feature.vocabulary != feature.column else ""
    return f"{kept:,} categories{rare}{many}{shared}"


def _dense(feature: DensePlan) -> str:
    if feature.kind == "missing":
        return "marks missing values"
    log = "log1p, " if feature.log1p else ""
    marks = {"plain": "", "comma": "decimal commas, ", "thousands": "commas for thousands, "}[feature.marks]
    return f"{marks}{log}mean {feature.mean:.4g}, std {feature.std:.4g}, missing {feature.median:.4g}"
