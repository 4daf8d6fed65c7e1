"""Turns a record of any known shape into conversations for SFT or examples for KTO.

A conversation is a list of messages {"role": "system" | "user" | "assistant", "content": text}. An assistant's message
with "weight": 0 is context and is not trained on. docs/data-formats.md lists the shapes.
"""

import re
from typing import NamedTuple

from core.files import InputError, printable, shown, warn_once
from core.records import Fields, is_empty

ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant")
TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}
TOOL_PARTS = {"tool_use", "tool_call", "tool_result", "function_call"}
ENDS = ("<|im_end|>", "<|endoftext|>")  # end tokens, which some data sets append to their replies
MEDIA = ("images", "image", "videos", "video", "audios", "audio")  # LLaMA-Factory, LLaVA
WEIGHTS = ("weight", "loss", "loss_weight", "train")  # OpenAI, ms-swift, LLaMA-Factory, axolotl


class Unusable(InputError):
    """A well-formed record that a text model cannot learn from. reason: a few words, for counting such records."""

    def __init__(self, where: str, reason: str, message: str):
        super().__init__(f"{where}: {message}; remove the record")
        self.reason = reason


class Dialogue(NamedTuple):
    """One conversation of a record.

    prompt: the messages before the reply. reply: the assistant's last message, None if there is none.
    rejected: in a preference, the worse reply as a list of messages, else None.
    all_turns: True if the assistant's turns inside the prompt are trained on too.
    """

    prompt: list[dict]
    reply: dict | None
    rejected: list[dict] | None = None
    all_turns: bool = False

    def messages(self) -> list[dict]:
        """The prompt and, if there is one, the reply."""
        return self.prompt + [self.reply] * (self.reply is not None)


def as_fields(record: dict) -> Fields:
    """The record as Fields, which remember the keys that were not read."""
    return record if isinstance(record, Fields) else Fields(record)


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def content_text(content: object, where: str, message: str) -> str | None:
    """A message's content (a text or a list of text parts) as text; None if it is anything else."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        fields = Fields(part) if isinstance(part, dict) else {"text": part}
        kind, text = fields.get("type", "text"), fields.get("text", fields.get("value"))
        if isinstance(kind, str) and kind in TOOL_PARTS:
            raise Unusable(where, "tool use", f"{message} holds a part of type {kind}, and tool use is not supported")
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise Unusable(
                where, "a part that is not text", f"{message} holds a part of type {shown(kind)} that is not text"
            )
        texts.append(text)
    return "".join(texts)


def is_supervised(message: Fields, where: str) -> bool:
    """False if "weight": 0, "loss": false or a similar key excludes the message from the loss."""
    for key in WEIGHTS:
        value = message.first(key)
        if value is not None and (not isinstance(value, (bool, int, float)) or value not in (0, 1)):
            raise InputError(
                f"{where} has the {key} {shown(value)}; 1 or true trains on the turn, 0 or false leaves it out"
            )
        if value is not None and not value:
            return False
    return True


def as_message(value: object, where: str, i: int, unread: set) -> dict:
    """Checks message i of a record -> {"role", "content"}, with "weight": 0 if it is excluded from the loss."""
    message = f"message {i}"
    if not isinstance(value, dict):
        raise InputError(f"{where}: {message} is {shown(value)}; a message is an object with a role and a content")
    fields = Fields(value)
    role = fields.first("role", "from")
    if role is None or not isinstance(role, str):
        raise InputError(f"{where}: {message} needs a role, one of system, user, assistant")
    if role in TOOL_ROLES or fields.first("tool_calls") or fields.first("function_call"):
        raise Unusable(where, "tool use", f"{message} ({role}) calls tools or answers a call, which is not supported")
    if role == "developer":
        raise Unusable(where, "role developer", f"{message} has the role developer, which ChatML models do not know")
    if role not in ROLES:
        raise Unusable(where, "unknown role", f"{message} has the role {shown(role)}; known are {', '.join(ROLES)}")
    message += f" ({role})"
    text = content_text(fields.first("content", "value"), where, message)
    if text is None:
        raise InputError(f"{where}: {message} has no content; give a text or a list of text parts")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable(where, "garbled text", f"{message} holds half of a surrogate pair") from None
    out = {"role": ROLES[role], "content": text}
    if out["role"] == "assistant" and (end := next((e for e in ENDS if text.rstrip().endswith(e)), None)):
        said = f"a reply ends with {end}, which is encoded as ordinary text; remove it, the token itself is added"
        warn_once(f"{where.rpartition(':')[0]}: {said}")
    if out["role"] == "assistant" and not is_supervised(fields, f"{where}: {message}"):
        out["weight"] = 0
    unread |= {f"messages.{key}" for key in fields.unread if out["role"] == "assistant" or key not in WEIGHTS}
    return out


def as_messages(value: object, where: str, role: str = "user", unread: set | None = None) -> list[dict]:
    """A text (one message of `role`), a message, or a list of messages -> a checked list of messages.

    Reads the keys of OpenAI's messages (role, content) and ShareGPT's (from, value). Adds all other keys to `unread`.
    """
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a text or a list of messages, found {shown(value)}")
    unread = set() if unread is None else unread
    return [as_message(message, where, i, unread) for i, message in enumerate(value)]


def is_transcript(value: object) -> bool:
    """True for Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def transcript(text: str, where: str) -> list[dict]:
    """Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..." -> list of messages."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)
    if len(parts) < 3 or parts[0].strip():
        raise InputError(f"{where}: has no prompt, and chosen is neither messages nor 'Human: ... Assistant: ...'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return as_messages([{"role": roles[r], "content": c} for r, c in zip(parts[1::2], parts[2::2])], where)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def with_system(messages: list[dict], fields: Fields, where: str) -> list[dict]:
    """The messages with the record's system prompt before them, if it has one."""
    system = fields.first("system", "system_prompt")
    if system is None or is_empty(system):
        return messages
    first = as_messages(system, where, "system")
    if messages and messages[0]["role"] == "system":
        if messages[0] != first[0]:
            raise InputError(f"{where}: system and the system message of the conversation differ; keep one of them")
        return messages
    return first + messages


def single_prompt(fields: Fields, where: str) -> list[dict] | None:
    """The messages before the reply in a record with one exchange: Alpaca's, Dolly's, OpenOrca's, TRL's.

    input, context and query follow the instruction after a newline; the turns of history come before it. None if the
    record has no prompt.
    """
    key = fields.first_key("instruction", "Instruction", "prompt", "question", "query")
    if key is None:
        return None
    value, extras = fields.first(key), [fields.first(extra) for extra in ("input", "context", "query") if extra != key]
    extras = [text for text in extras if text not in (None, "")]
    if extras and not all(isinstance(text, str) for text in (value, *extras)):
        raise InputError(f"{where}: instruction, input and context are texts")
    if extras:
        value = "\n".join([value, *extras] if value else extras)
    if is_transcript(value):
        raise Unusable(where, "a transcript as prompt", f"{key} is a text with Human: and Assistant:, not one turn")
    if isinstance(value, str) and value.startswith("<|im_start|>"):
        text = f"{key} begins with <|im_start|>, which is encoded as ordinary text; give the turns as messages"
        warn_once(f"{where.rpartition(':')[0]}: {text}")
    messages = as_messages(value, where, unread=fields.unread)
    history = fields.first("history") or []
    if history and not isinstance(value, str):
        raise InputError(
            f"{where}: {key} is a list of messages, and there is a history too; put all turns into one of them"
        )
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise InputError(f"{where}: history is {shown(history)}; it must be a list of [question, answer] pairs")
    for pair in reversed(history):
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
        messages = as_messages(turns, where) + messages
    return messages


def single_reply(fields: Fields, where: str) -> tuple[object, object]:
    """The reply, or the better and the worse reply, in a record with one exchange -> (reply, rejected), unchecked."""
    if "output_1" in fields and "output_2" in fields:  # AlpacaEval's pairs
        outputs = fields.first("output_1"), fields.first("output_2")
        preference = fields.first("preference")
        if preference in (1, 2):
            return outputs[:: 1 if preference == 1 else -1]
        return outputs[0], None
    reply = fields.first("output", "response", "completion", "chosen")
    if reply is None:  # an answer beside an empty reply may be a reference
        reply = fields.first("std_answer", "answer")
    if not isinstance(reply, list) or not all(isinstance(text, str) for text in reply):
        return reply, None
    if len(reply) > 1 and "output" in fields:
        return reply[0], reply[1]  # LLaMA-Factory's ranked replies, the best first
    if len(reply) != 1:
        raise InputError(f"{where}: the reply is the list {shown(reply)}; give one text, or ranked texts as output")
    return reply[0], None


def one_reply(value: object, where: str) -> dict:
    """A completion, as a text or as a list of one assistant message -> that message."""
    reply = as_messages(value, where, role="assistant")
    if len(reply) != 1 or reply[0]["role"] != "assistant":
        raise InputError(f"{where}: a completion is one assistant message")
    return reply[0]


def preference_dialogue(
    prompt: list[dict] | None, chosen: object, rejected: object, fields: Fields, where: str
) -> Dialogue:
    """A Dialogue from two replies to a prompt, or from two whole conversations with the same beginning."""
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if texts and (prompt is None or is_transcript(chosen) and is_transcript(rejected)):
        chosen, rejected = transcript(chosen, where), transcript(rejected, where)
    else:
        chosen, rejected = (as_messages(value, where, "assistant", fields.unread) for value in (chosen, rejected))
    if prompt and prompt[-1] == chosen[-1]:  # UltraFeedback's messages have the chosen reply too
        prompt = prompt[:-1]
    if prompt is None or chosen[0]["role"] != "assistant":  # whole conversations
        before, chosen = chosen[:-1], chosen[-1:]
        rejected = rejected[len(before) :] if rejected[: len(before)] == before else rejected
        prompt = joined_prompt(prompt or [], before, where)
    return Dialogue(prompt, one_reply(chosen, where), rejected)


def joined_prompt(prompt: list[dict], before: list[dict], where: str) -> list[dict]:
    """The prompt of a record whose chosen conversation repeats all or the end of it. before: turns before the reply."""
    if any(before[i : i + len(prompt)] == prompt for i in range(len(before))) or not prompt:
        return before
    if before and prompt[-len(before) :] == before:
        return prompt
    raise InputError(f"{where}: chosen is a whole conversation, but does not contain the prompt")


def has_pair(fields: Fields) -> bool:
    """True if the record has two replies to compare. Columns that are both empty are no pair."""
    pairs = ("chosen", "rejected"), ("chosen_messages", "rejected_messages")
    found = [[fields[key] for key in pair] for pair in pairs if fields.keys() >= {*pair}]
    return any(not all(map(is_empty, replies)) for replies in found)


def one_dialogue(fields: Fields, where: str) -> Dialogue:
    """The conversation of a record: a preference, a list of turns, or one exchange."""
    turns = fields.first("messages", "conversations", "conversation")
    if turns and not isinstance(turns, list):
        raise InputError(f"{where}: the conversation is {shown(turns)}; it must be a list of messages")
    prompt = as_messages(turns, where, unread=fields.unread) if turns else single_prompt(fields, where)
    if has_pair(fields):
        chosen, rejected = fields.first("chosen", "chosen_messages"), fields.first("rejected", "rejected_messages")
        return preference_dialogue(prompt, chosen, rejected, fields, where)
    if turns and prompt[-1]["role"] == "assistant":
        return Dialogue(prompt[:-1], prompt[-1], all_turns=True)
    if prompt is not None:  # also if `messages` is only the prompt and the reply has its own key
        reply, rejected = (
            value if value is None else as_messages(value, where, "assistant", fields.unread)
            for value in single_reply(fields, where)
        )
        all_turns = reply is None if turns else "history" in fields
        return Dialogue(prompt, reply and one_reply(reply, where), rejected, all_turns)
    if turns is not None:
        raise InputError(f"{where}: expected a text or a list of messages, found {shown(turns)}")
    keys = ", ".join(printable(key[:60]) for key in sorted(fields)[:20]) or "all null"
    raise InputError(
        f"{where}: no known shape, the keys are {keys}; expected messages, conversations, instruction and output, "
        "prompt and completion, question and answer, or prompt, chosen and rejected"
    )


def instance_dialogues(fields: Fields, where: str) -> list[Dialogue]:
    """The conversations of a record of self-instruct: one for each of its `instances`."""
    instances = fields.first("instances")
    whole = {key: value for key, value in fields.items() if key != "instances"}
    fields.unread -= {"instruction"}
    if not instances or not all(isinstance(one, dict) for one in instances):
        raise InputError(
            f"{where}: instances is {shown(instances)}; it must be a list of objects with input and output"
        )
    return [dialogue for one in instances for dialogue in dialogues({**whole, **one}, where)]


def offers_tools(value: object) -> bool:
    """True unless a record's list of tools is absent or empty. It may be JSON in a text, such as "[]" or "null"."""
    return "".join(value.split()) not in ("", "[]", "{}", "null") if isinstance(value, str) else bool(value)


def dialogues(record: dict, where: str) -> list[Dialogue]:
    """The conversations of a record of any known shape: one, or one for each of self-instruct's `instances`.

    record: a dict, or Fields, whose `unread` then has the keys that were not used. where: "file:line", for errors.
    """
    fields = as_fields(record)
    if offers_tools(fields.first("tools", "functions")):
        raise Unusable(where, "tool use", "offers tools, which are not supported")
    if media := [key for key in MEDIA if fields.get(key)]:
        raise Unusable(where, "a part that is not text", f"holds {media[0]}, and only text is supported")
    if "instruction" in fields and isinstance(fields.get("instances"), list):
        return instance_dialogues(fields, where)
    found = one_dialogue(fields, where)
    return [found._replace(prompt=with_system(found.prompt, fields, where))]


# ---------------------------------------------------------------------------------------------------------------------
# Examples


def sft_conversations(record: dict, where: str, last_turn_only: bool = False) -> list[list[dict]]:
    """The conversations of a record, for SFT.

    An assistant turn that is not trained on gets "weight": 0. Trained on are:
    - messages, conversations, history: every assistant turn; with last_turn_only the last one.
    - prompt and completion: the completion.
    - chosen and rejected: the chosen reply.

    InputError if a KTO label says that the reply is undesirable.
    """
    fields, found = as_fields(record), []
    for dialogue in dialogues(fields, where):
        if dialogue.rejected is None and fields.get("label", fields.get("kto_tag")) is False:
            raise InputError(f"{where}: its label is false, an undesirable reply: leave it out or use train_kto.py")
        fields.unread |= {"rejected"} if dialogue.rejected else set()
        messages = dialogue.messages()
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise InputError(f"{where}: no assistant message, so nothing to train on")
        if last_turn_only or not dialogue.all_turns:
            for i in turns[:-1]:
                messages[i] = messages[i] | {"weight": 0}
        found.append(messages)
    return found


def kto_examples(record: dict, where: str) -> list[tuple[list[dict], str, bool]]:
    """The KTO examples of a record: [(prompt messages, completion text, label)].

    A reply with a label gives one example. A preference gives two: chosen with true, then rejected with false.
    """
    fields, examples = as_fields(record), []
    for prompt, reply, rejected, _ in dialogues(fields, where):
        if reply is None or not prompt:
            raise InputError(f"{where}: has no {'completion' if prompt else 'prompt'}; a KTO example needs both")
        if rejected is not None:
            if len(rejected) != 1 or rejected[0]["role"] != "assistant":
                raise Unusable(where, "no shared prompt", "chosen and rejected differ before their last message")
            examples += [(prompt, reply["content"], True), (prompt, rejected[0]["content"], False)]
            continue
        label = fields.first("label", "kto_tag")
        if not isinstance(label, bool):
            key = "kto_tag" if "kto_tag" in fields and "label" not in fields else "label"
            found = "missing or null" if label is None else shown(label)
            raise InputError(f"{where}: {key} is {found}; it must be true (desirable) or false (undesirable)")
        examples.append((prompt, reply["content"], label))
    return examples
