"""The public benchmarks, from benchmarks/accuracy.py with a data set: one table per model and set."""

from __future__ import annotations

from typing import Any

from harness import table

from report_blocks import block, link


def part(document: dict[str, Any], file: str) -> str:
    """A column per ratio: the set's own figure in percent with its 95 % interval (withheld where requests failed), the
    prompt's tokens, failed requests."""
    rows = document["rows"]

    def figure(row: dict[str, Any]) -> str:
        found = row["headline"]
        return "withheld" if found is None else "{accuracy:.1f} [{low:.1f}, {high:.1f}]".format(**found)

    def tokens(row: dict[str, Any]) -> str:
        return "-" if row["prompt_tokens_mean"] is None else f"{row['prompt_tokens_mean']:,.0f}"

    header = [document["title"], *[f"ratio {row['retention_ratio']}" for row in rows]]
    lines = [[document["headline"], *map(figure, rows)], ["tokens per request", *map(tokens, rows)]]
    lines.append(["failed", *[str(row["failed"]) for row in rows]])
    asked, size = document["asked"], document["published_size"]
    part_of = "" if asked == size else f", {asked} of {size} questions: not the published set's figure"
    return f"{table(header, lines)}\n\n({document['model']}, {document['prompt']} prompt{part_of}; {link(file)})"


@block("accuracy_public", "accuracy_*_*.json")
def accuracy_public(results: dict[str, Any]) -> str:
    """Markdown of each results file."""
    return "\n\n".join(part(document, file) for file, document in results.items())
