"""Rows as training takes them: conversations, or a prompt with the answer that is better and the one that is worse."""

from ..errors import DataError
from .rows import Row

FORMS = ("messages", "preferences")
ABOUT = ("source", "topic", "document", "group", "mark", "history")  # that a finished row says of itself


def as_messages(row: Row) -> Row:
    """A conversation; a plain text stays one."""
    content = {"messages": row["messages"]} if "messages" in row else {"text": row["text"]}
    return {"id": row["id"]} | content | {key: row[key] for key in ABOUT if key in row}


def as_preference(row: Row) -> Row | None:
    """{"prompt", "chosen", "rejected"}, lists of messages as TRL's trainers take them; None of a single answer.

    Raises:
        DataError: a row that is no conversation.
    """
    if "messages" not in row:
        raise DataError(f"row {row['id']} is a text without a question. Leave it out")
    if "rejected" not in row:
        return None
    *prompt, chosen = row["messages"]
    rejected = {"role": "assistant", "content": row["rejected"]["content"]}
    made = {"id": row["id"], "prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
    return made | {key: row[key] for key in ABOUT if key in row}
