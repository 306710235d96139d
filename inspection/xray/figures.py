"""The figures of a finished pass: what xray.json says, asked of the tables that the pass left."""

from typing import Any

import numpy as np
import pyarrow as pa

from inspection.xray import rubric
from inspection.xray.masks import padding_share
from inspection.xray.scan import SHOWN_ROWS, Scan, Snippet

BINS = 24


def finish(scan: Scan, batch: int = 32, parts: int = 1, seed: int = 0, pack: bool = False) -> dict[str, Any]:
    """All keys of xray.json that come from the rows. The others: of a training run, for the padding."""
    if scan.shape is None:
        raise ValueError("no row could be read")
    _duplicates(scan)
    if scan.shape.name == "tree":
        tree = _tree(scan)
        scan.learn_paths()
    scan.flush()
    _set_rules(scan)
    made = {
        "rows_read": scan.rows,
        "shape": scan.shape.name,
        "signature_column": scan.shape.column,
        "splits": dict(scan.splits),
        "columns": [
            {"name": name, "type": " or ".join(sorted(types)), "nulls": scan.nulls[name]}
            for name, types in scan.types.items()
        ],
        "lengths": _lengths(scan),
        "duplicates": _duplicate_counts(scan),
        "repeated_prompts": _repeated_prompts(scan),
        "findings": _findings(scan),
        "leakage": [leak._asdict() for leak in scan.leaks],
        "mask": _mask(scan, batch, parts, seed, pack),
        "examples": [_shown(snippet) for snippet in _examples(scan)],
    }
    if scan.shape.name == "tree":
        made["tree"] = tree
    if scan.shape.name == "preference":
        made["pairs"] = _pairs(scan)
    return made


def _shown(snippet: Snippet) -> dict[str, Any]:
    return {"row": snippet.row, "where": snippet.where, "text": snippet.text, "why": snippet.why}


def _one(scan: Scan, query: str, values: list = ()) -> tuple:
    return scan.sql.execute(query, list(values)).fetchall()[0]


# --- lengths ---


def _lengths(scan: Scan) -> dict[str, Any]:
    made = {}
    for place, name in enumerate(scan.columns):
        made[name] = {"characters": _spread(scan, f"c{place}")}
        if scan.options.counter is not None:
            made[name]["tokens"] = _spread(scan, f"t{place}")
    return made


def _spread(scan: Scan, column: str) -> dict[str, Any] | None:
    """Median and 95 % by linear interpolation, as pandas' quantile has them."""
    count, total, least, most, median, high = _one(
        scan,
        f"SELECT count({column}), sum({column}), min({column}), max({column}), quantile_cont({column}, 0.5),"
        f" quantile_cont({column}, 0.95) FROM rows",
    )
    if not count:
        return None
    return {
        "median": median,
        "p95": high,
        "max": most,
        "min": least,
        "total": int(total),
        "histogram": _histogram(scan, column, most),
    }


def _histogram(scan: Scan, column: str, most: int) -> dict[str, list]:
    """Columns of equal width up to the 99 % point, and one for the rest."""
    (edge,) = _one(scan, f"SELECT quantile_disc({column}, 0.99) FROM rows")
    width = max(1, -(-(int(edge) + 1) // BINS))
    counts = [0] * (BINS + 1)
    for place, count in scan.sql.execute(
        f"SELECT least({column} // {width}, {BINS})::INTEGER, count(*) FROM rows WHERE {column} IS NOT NULL GROUP BY 1"
    ).fetchall():
        counts[place] = count
    while len(counts) > 1 and not counts[-1]:
        counts.pop()
    edges = [width * place for place in range(len(counts))] + [
        max(most + 1, width * len(counts)) if len(counts) == BINS + 1 else width * len(counts)
    ]
    return {"edges": edges, "counts": counts}


# --- duplicates, prompts, trees, pairs ---


def _duplicates(scan: Scan) -> None:
    """Tables `exact` and `near`: a row and the earlier one that it repeats."""
    scan.sql.execute(
        "CREATE OR REPLACE TABLE exact AS SELECT rows.row AS row, first FROM rows JOIN"
        " (SELECT key, min(row) AS first FROM rows WHERE key IS NOT NULL GROUP BY key HAVING count(*) > 1) USING (key)"
        " WHERE rows.row <> first"
    )
    scan.sql.execute("CREATE OR REPLACE TABLE near (row BIGINT, first BIGINT, similarity DOUBLE)")
    if scan.near is None:
        return
    known = np.array([row for (row,) in scan.sql.execute("SELECT row FROM exact ORDER BY row").fetchall()], np.int64)
    found = list(scan.near.pairs(known))
    if found:
        rows, first, similarity = zip(*found, strict=True)
        table = pa.table({"row": rows, "first": first, "similarity": similarity})
        scan.sql.register("found_pairs", table)
        scan.sql.execute("INSERT INTO near SELECT * FROM found_pairs")
        scan.sql.unregister("found_pairs")


def _duplicate_counts(scan: Scan) -> dict[str, Any]:
    pairs = scan.sql.execute(
        "SELECT row, first, similarity FROM near ORDER BY similarity DESC, row LIMIT 20"
    ).fetchall()
    return {
        "exact": _one(scan, "SELECT count(*) FROM exact")[0],
        "near": _one(scan, "SELECT count(*) FROM near")[0],
        "near_threshold": scan.options.near,
        "near_rows_compared": min(scan.rows, scan.near.count) if scan.near is not None else 0,
        "nearest": [{"row": row, "other_row": first, "jaccard": round(value, 4)} for row, first, value in pairs],
    }


def _repeated_prompts(scan: Scan, most: int = 10) -> list[dict[str, Any]]:
    if scan.shape.name not in ("sft", "chat", "eval", "rag", "tree"):
        return []
    counts = scan.sql.execute(
        "SELECT prompt, count(*) AS n, min(row) FROM rows WHERE prompt IS NOT NULL GROUP BY prompt HAVING n > 1"
        " ORDER BY n DESC, 3 LIMIT 100"
    ).fetchall()
    shown = [(scan.prompts[key][0], count, row) for key, count, row in counts if key in scan.prompts]
    return [{"text": text, "count": count, "first_row": row} for text, count, row in shown[:most]]


def _tree(scan: Scan) -> dict[str, Any]:
    """Rules of a message's place in its tree, and what trees there are."""
    sql = scan.sql
    sql.execute("CREATE OR REPLACE TABLE ids AS SELECT id, any_value(role) AS role FROM tree GROUP BY id")
    wrong = {
        "orphan": "SELECT row FROM tree WHERE parent IS NOT NULL AND parent NOT IN (SELECT id FROM ids) ORDER BY row",
        "role_alternation": "SELECT tree.row FROM tree LEFT JOIN ids ON tree.parent = ids.id"
        " WHERE (tree.parent IS NULL AND tree.role <> 'prompter') OR ids.role = tree.role ORDER BY 1",
    }
    for rule, query in wrong.items():
        if rule in scan.options.rules:
            rows = [row for (row,) in sql.execute(query).fetchall()]
            if rows:
                scan._record(rule, rows)
    trees, messages = _one(scan, "SELECT count(*) FILTER (parent IS NULL), count(*) FROM tree")
    # a path is walked from its leaf; UNION (without ALL) ends where parents form a circle
    (deepest,) = _one(
        scan,
        "WITH RECURSIVE depth(id, level) AS (SELECT id, 1 FROM tree WHERE parent IS NULL UNION"
        " SELECT tree.id, level + 1 FROM tree JOIN depth ON tree.parent = depth.id WHERE level < 1000)"
        " SELECT max(level) FROM depth",
    )
    roles = dict(sql.execute("SELECT role, count(*) FROM tree GROUP BY role ORDER BY 2 DESC LIMIT 20").fetchall())
    languages = dict(
        sql.execute(
            "SELECT lang, count(*) FROM tree WHERE lang IS NOT NULL GROUP BY lang ORDER BY 2 DESC LIMIT 50"
        ).fetchall()
    )
    (ranked,) = _one(scan, "SELECT count(*) FROM tree WHERE rank IS NOT NULL")
    (leaves,) = _one(
        scan, "SELECT count(*) FROM tree WHERE id NOT IN (SELECT parent FROM tree WHERE parent IS NOT NULL)"
    )
    return {
        "trees": trees,
        "messages": messages,
        "paths": leaves,
        "deepest": deepest or 0,
        "ranked": ranked,
        "roles": roles,
        "languages": languages,
    }


def _pairs(scan: Scan) -> dict[str, Any]:
    count, longer, chosen, rejected = _one(
        scan,
        "SELECT count(*), count(*) FILTER (chosen > rejected), quantile_cont(chosen, 0.5),"
        " quantile_cont(rejected, 0.5) FROM pairs",
    )
    return {
        "compared": count,
        "chosen_longer": longer,
        "chosen_longer_share": longer / count if count else None,
        "chosen_median_characters": chosen,
        "rejected_median_characters": rejected,
    }


# --- rules over the whole set ---

FEW_PAIRS = 20  # fewer tell nothing about a bias


def _set_rules(scan: Scan) -> None:
    known = [rule for rule in rubric.of_shape(scan.options.rules, scan.shape.name, "set") if rule.name != "leakage"]
    scan.sql.execute(
        "CREATE OR REPLACE TEMP VIEW place AS SELECT rows.row AS _row, exact.first AS _duplicate_of,"
        " near.first AS _near_duplicate_of, n AS _prompt_count, false AS _leaks,"
        f" (SELECT CASE WHEN count(*) >= {FEW_PAIRS} THEN avg((chosen > rejected)::INTEGER) END FROM pairs)"
        " AS _longer_share,"
        " coalesce(pairs.chosen > pairs.rejected, false) AS _is_longer"
        " FROM rows LEFT JOIN exact ON rows.row = exact.row LEFT JOIN near ON rows.row = near.row"
        " LEFT JOIN pairs ON rows.row = pairs.row"
        " LEFT JOIN (SELECT prompt, count(*) AS n FROM rows WHERE prompt IS NOT NULL GROUP BY prompt HAVING n > 1)"
        " USING (prompt)"
    )
    for rule in known:
        try:
            scan.sql.execute(f"INSERT INTO found SELECT '{rule.name}', _row FROM place WHERE {rule.condition}")
        except Exception as error:
            scan.skipped_rules[rule.name] = str(error).strip().splitlines()[0]


def _findings(scan: Scan) -> list[dict[str, Any]]:
    """The most severe first. `rows` are the first SHOWN_ROWS of them."""
    made = []
    counts = dict(scan.sql.execute("SELECT rule, count(DISTINCT row) FROM found GROUP BY rule").fetchall())
    for name, count in counts.items():
        rule = scan.options.rules.get(name)
        if rule is None:
            continue
        rows = scan.sql.execute(
            f"SELECT DISTINCT row FROM found WHERE rule = ? ORDER BY row LIMIT {SHOWN_ROWS}", [name]
        ).fetchall()
        made.append(
            {
                "id": name,
                "rule": rule.condition or rule.reason,
                "reason": rule.reason,
                "severity": rule.severity,
                "count": count,
                "rows": [row for (row,) in rows],
                "shown": [_shown(snippet) for snippet in scan.snippets.get(name, [])],
            }
        )
    return sorted(
        made, key=lambda finding: (rubric.SEVERITIES.index(finding["severity"]), -finding["count"], finding["id"])
    )


def _examples(scan: Scan) -> list[Snippet]:
    """Three telling rows: a typical one, the longest, the shortest."""
    sample = sorted((snippet for _, snippet in scan._sample), key=lambda snippet: snippet.length)
    made = []
    if sample:
        usual = sample[len(sample) // 2]
        usual.why = f"typical: of median length in a sample of {len(sample)} ({usual.length:,} characters)"
        made.append(usual)
    for name in ("longest", "shortest"):
        if snippet := scan.examples.get(name):
            snippet.why = f"the {name}: {snippet.length:,} characters"
            if all(snippet.row != other.row for other in made):
                made.append(snippet)
    return made


def _mask(scan: Scan, batch: int, parts: int, seed: int, pack: bool) -> dict[str, Any] | None:
    masks = scan._masks
    if masks is None:
        return None
    zero, cut, targets, tokens, no_end = _one(
        scan,
        "SELECT count(*) FILTER (targets = 0), count(*) FILTER (tokens > ?), sum(targets), sum(tokens),"
        " count(*) FILTER (targets > 0 AND NOT has_end) FROM masks",
        [masks.sequence],
    )
    lengths = masks.lengths
    bits = _one(scan, "SELECT count(bits), avg(bits), quantile_cont(bits, 0.5) FROM masks")
    made = {
        "rows_examined": scan.mask.get("rows", 0),
        "sequence": masks.sequence,
        "zero_target_rows": zero,
        "truncated_rows": cut,
        "missing_end_rows": no_end,
        "target_tokens": int(targets or 0),
        "tokens": int(tokens or 0),
        "training_rows": len(lengths),
        "padding_share": padding_share(lengths, batch, parts, seed, masks.sequence if pack else None),
        "packing_efficiency": 1 - padding_share(lengths, batch, parts, seed, masks.sequence) if lengths else None,
    }
    if bits[0]:
        made["bits"] = {"rows": bits[0], "mean": bits[1], "median": bits[2]}
    made["examples"] = [
        {"row": row, "spans": [{"text": text, "learnt": learnt} for text, learnt in spans]}
        for row, spans in scan.mask_examples
    ]
    return made
