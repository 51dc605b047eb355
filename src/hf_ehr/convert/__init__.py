"""Weights of the authors' Med-BERT, held by a user, to a model folder of this package, with proof of equal outputs.

    checkpoint (BertForPreTraining layout) ─ names, strictly ─▶ MedBertForPreTraining ─┐
    vocabulary (code → id)                 ─ our spelling ────▶ EhrCodeTokenizer ──────┴─▶ folder, conversion.json

Tensors are read, nothing is unpickled. A TensorFlow checkpoint is first written as safetensors under its own names,
where TensorFlow is installed:

    reader = tf.train.load_checkpoint("model.ckpt")
    arrays = {name: np.ascontiguousarray(reader.get_tensor(name)) for name in reader.get_variable_to_shape_map()}
    safetensors.numpy.save_file(arrays, "model.safetensors")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import BertForPreTraining

from hf_ehr.convert._vocabulary import read_json, read_tokenizer
from hf_ehr.convert._weights import Layout, bert_with, medbert_with, named_as_bert, read_tensors, weights_file
from hf_ehr.models.modeling_medbert import MedBertForPreTraining
from hf_ehr.schema import EhrDataError, atomic_folder

REPORT_FILE = "conversion.json"
TOLERANCE = 1e-4
"""Greatest difference between the outputs of both models: fp32 sums in another order, far below any wrong weight."""


@dataclass
class ConvertArguments:
    """Arguments of `hf-ehr convert medbert`."""

    checkpoint: str = field(
        metadata={"help": "BertForPreTraining weights: .safetensors, a torch file of tensors, or a folder with one."}
    )
    vocabulary: str = field(metadata={"help": "The authors' code → id table as .json or .tsv."})
    output: str = field(metadata={"help": "Folder to write; must not exist or be empty."})
    config: str | None = field(
        default=None, metadata={"help": "config.json of the weights; the checkpoint folder's own when left out."}
    )


@dataclass(frozen=True)
class ConversionReport:
    """What was converted, and how far both models are apart; stored as `conversion.json`.

    Attributes:
        output: Name of the folder that was written.
        layout: Whose names the weights came with.
        sha256: Of the checkpoint file.
        hidden_act: Activation of the converted model.
        parameters: Number of parameters, shared ones once.
        codes: Number of codes, without the empty one.
        own_spelling: Codes that keep the authors' spelling: without `ICD9_` or `ICD10_`, or equal to an earlier code
            once both are written as ours. Their rows are there; records do not reach them.
        ignored: Entries of the checkpoint that are no weights of the model.
        differences: Output → greatest absolute difference from transformers' `BertForPreTraining`, fp32.
        compared: Number of code states that were compared.
    """

    output: str
    layout: Layout
    sha256: str
    hidden_act: str
    parameters: int
    codes: int
    own_spelling: list[str]
    ignored: list[str]
    differences: dict[str, float]
    compared: int

    def __str__(self) -> str:
        apart = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
        lines = [
            f"{self.parameters:,} parameters and {self.codes:,} codes ({self.layout} names) in {self.output}.",
            f"Greatest difference from BertForPreTraining on {self.compared} codes: {apart}.",
        ]
        if self.own_spelling:
            lines.append(f"{len(self.own_spelling)} codes keep the authors' spelling, see {REPORT_FILE}.")
        if self.ignored:
            lines.append(f"Left out: {len(self.ignored)} entries that are no weights, see {REPORT_FILE}.")
        return "\n".join(lines)


def convert(arguments: ConvertArguments) -> ConversionReport:
    """:func:`convert_medbert` with the arguments of the command line."""
    config = None if arguments.config is None else Path(arguments.config)
    return convert_medbert(Path(arguments.checkpoint), Path(arguments.vocabulary), Path(arguments.output), config)


def convert_medbert(checkpoint: Path, vocabulary: Path, output: Path, config: Path | None = None) -> ConversionReport:
    """Converts Med-BERT weights in the layout of transformers' `BertForPreTraining` and proves equal outputs.

    The second head (`cls.seq_relationship`) is the prolonged-stay classifier, id 0 is padding and mask (Rasmy et al.,
    npj Digit Med 2021, and the code released with it). Without a config the heads are 32 wide and the activation is
    the tanh form of gelu. That is what TensorFlow's BERT calls `gelu`, and so does the config beside weights under
    TensorFlow's names; beside weights under transformers' names `gelu` is what transformers calls so.

    Args:
        checkpoint: A `.safetensors` file, a torch file with a dict of tensors, or a folder with `model.safetensors`
            or `pytorch_model.bin`. Names as in transformers or as in TensorFlow (`bert/encoder/layer_0/…/kernel`).
        vocabulary: `.json` (an object of code → id) or `.tsv` (code, id; a first line of titles is allowed). Codes as
            the authors write them, `ICD9_150.6` or `ICD10_C50`.
        output: Folder to write.
        config: `config.json` of the weights; the checkpoint folder's own by default.

    Returns:
        The report, also in `conversion.json`.

    Raises:
        EhrDataError: A file cannot be read without unpickling, keys or shapes are not those of the layout, ids have
            gaps or do not fit the embedding, or the outputs differ by more than 1e-4. Nothing is written then.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise EhrDataError(f"`output` must not exist or be an empty folder, got {output}. Name another one.")
    file = weights_file(checkpoint)
    weights, ignored, layout = named_as_bert(read_tensors(file))
    own = checkpoint / "config.json"
    settings = {} if config is None and not own.is_file() else read_json(config or own, "config")
    bert = bert_with(weights, settings, layout)
    tokenizer, own_spelling = read_tokenizer(vocabulary, bert.config.vocab_size)
    model = medbert_with(bert)
    differences, compared = compare_outputs(bert, model)
    if not all(value <= TOLERANCE for value in differences.values()):  # NaN is not small either
        raise EhrDataError(f"Outputs must differ by at most {TOLERANCE}, got {differences}. Check the weights.")
    report = ConversionReport(
        output.name, layout, _sha256(file), model.config.hidden_act, sum(p.numel() for p in model.parameters()),
        len(tokenizer) - 1, own_spelling, ignored, differences, compared,
    )  # fmt: skip
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


def compare_outputs(bert: BertForPreTraining, model: MedBertForPreTraining) -> tuple[dict[str, float], int]:
    """Greatest absolute differences on random histories: one of full length, and some that are padded.

    Args:
        bert: transformers' model in evaluation mode.
        model: Ours in evaluation mode, of the same sizes.

    Returns:
        Differences of the code states, the code scores and the stay scores, and the number of codes compared.
    """
    generator = torch.Generator().manual_seed(0)
    longest = bert.config.max_position_embeddings
    parts: dict[str, list[torch.Tensor]] = {"last_hidden_state": [], "prediction_logits": [], "stay_logits": []}
    compared = 0
    for lengths in ([longest], [min(length, longest) for length in (40, 25, 12, 7, 3, 2, 1)]):
        batch = _histories(lengths, bert.config, generator)
        valid = batch["attention_mask"].bool()
        compared += int(valid.sum())
        with torch.no_grad():
            theirs = bert(*batch.values(), output_hidden_states=True)  # its third input is `token_type_ids`
            ours = model(**batch, output_hidden_states=True)
        apart = (
            (theirs.hidden_states[-1] - ours.hidden_states[-1])[valid],
            (theirs.prediction_logits - ours.prediction_logits)[valid],
            theirs.seq_relationship_logits - ours.stay_logits,
        )
        for values, difference in zip(parts.values(), apart, strict=True):
            values.append(difference.abs().max())
    return {name: float(torch.stack(values).max()) for name, values in parts.items()}, compared


def _histories(lengths: Sequence[int], config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Right-padded random codes, hidden ones (id 0) among them, in ascending visits; each (patients, longest)."""
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    codes = torch.randint(0, config.vocab_size, shape, generator=generator)
    visits = torch.randint(1, config.type_vocab_size, shape, generator=generator).sort(dim=1).values
    return {"input_ids": codes * mask, "attention_mask": mask, "visit_ids": visits * mask}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["ConversionReport", "ConvertArguments", "compare_outputs", "convert", "convert_medbert"]
