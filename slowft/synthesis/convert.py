"""Brings rows into the forms that training takes: a conversation, or a prompt with a better and a worse answer."""

from ..errors import DataError
from .rows import Row

KEPT_FIELDS = ("source", "topic", "document", "group", "mark", "history")  # fields of a row that a finished row keeps


def as_messages(row: Row) -> Row:
    """The row as a conversation. A plain text stays a plain text."""
    content = {"messages": row["messages"]} if "messages" in row else {"text": row["text"]}
    return {"id": row["id"]} | content | {key: row[key] for key in KEPT_FIELDS if key in row}


def as_preference(row: Row) -> Row | None:
    """{"prompt", "chosen", "rejected"}: lists of messages, as TRL's trainers take them. None if there is one answer.

    Raises:
        DataError: the row is no conversation.
    """
    if "messages" not in row:
        raise DataError(f"row {row['id']} is a text without a question. Leave it out")
    if "rejected" not in row:
        return None
    *prompt, chosen = row["messages"]
    rejected = {"role": "assistant", "content": row["rejected"]["content"]}
    preference = {"id": row["id"], "prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
    return preference | {key: row[key] for key in KEPT_FIELDS if key in row}
