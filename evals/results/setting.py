"""What decides a model's answers, as a record and as a digest: results are only ever continued under the same one.

In the digest is what decides numbers: the weights bit for bit (and so their dtype), the mask, the tokenizer, the chat
template with the date that it writes, the window, the tokens that end an answer, seeds and the precision of matrix
products. Beside it stands what is only good to know: where the model was loaded from, its sizes and its past. Versions,
devices and batches change rounding at most, and stand with each result. What finds all of this out is
`evals.results.describe`.
"""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

from gluprune_jax.files.records import json_digest

# What is known of a date that was asked for, and is not that of the first run.
GIVEN = "given"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and the way it is asked.

    Attributes:
      label: names the model to a reader, such as "smollm2-135m-instruct.ppm-1383".
      dtype: of the weights; "mixed" where they differ.
      decides: what decides the answers, as JSON.
      about: what else is known, as JSON.
    """

    label: str
    dtype: str
    decides: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the answers."""
        return json_digest(self.decides)

    @property
    def date(self) -> str | None:
        """The day, YYYY-MM-DD, that the chat template writes into prompts; None where it writes none."""
        date: str | None = (self.decides.get("chat_template") or {}).get("date")
        return date

    def on(self, date: datetime.date | None) -> "Setting":
        """The same, asked on another day."""
        chat = self.decides.get("chat_template")
        if chat is None or date is None:
            return self
        return dataclasses.replace(self, decides={**self.decides, "chat_template": {**chat, "date": date.isoformat()}})

    @property
    def folder_name(self) -> str:
        """The readable name with the start of the digest."""
        chat = ".chat" if self.decides.get("chat_template") else ""
        return f"{self.label}.{self.dtype}{chat}-{self.digest[:8]}"
