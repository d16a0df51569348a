"""The evaluations of a run on its validation splits, and the texts that it generates along the way."""

from jax.sharding import Mesh

from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.data.batches import rows_of
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import row_layout
from gpt2_flax.inference.evaluation import Evaluation, evaluation_of, rows_to_read, sums_of_batches
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.processes.phases import Phases
from gpt2_flax.training.metrics import StepReport
from gpt2_flax.training.samples import sampler
from gpt2_flax.training.signals import StopRequest


class Validation:
    """Evaluates the validation split of each dataset that has one, and continues `training.prompts`."""

    def __init__(self, config: ResolvedConfig, mixture: Mixture, mesh: Mesh, phases: Phases):
        self._config, self._mixture, self._mesh, self._phases = config, mixture, mesh, phases
        self._rows = {
            folder: rows_of(dataset.validation, row_layout(config))
            for folder, dataset in mixture.datasets.items()
            if dataset.validation.n_documents
        }
        self._texts = sampler(config, mixture)
        self.without = [folder for folder in mixture.datasets if folder not in self._rows]
        """Datasets that have no validation split."""

    def run(self, step: int, model: GPT2, report: StepReport, stop: StopRequest | None) -> dict[str, Evaluation] | None:
        """Evaluate `model` and report the figures; return None, and report nothing, when `stop` asked to stop.

        Args:
            step: the step of `model`.
            model: parameters on the devices.
            report: receives the evaluations, and the generated texts.
            stop: asked after each batch; None: the evaluation runs to its end.
        """
        with self._phases.during("evaluation", step):
            evaluations = self._evaluations(model, stop, report)
            self._mixture.check_unchanged()
            if evaluations is not None:
                with report.screen.doing("continuing the prompts"):
                    texts = self._texts(model)
                report.evaluated(step, evaluations, texts)
        return evaluations

    def _evaluations(self, model: GPT2, stop: StopRequest | None, report: StepReport) -> dict[str, Evaluation] | None:
        n_rows, n_batches = self._config.data.global_batch_size, self._config.training.evaluation_batches
        total = sum(rows_to_read(rows, n_rows, n_batches) for rows in self._rows.values()) // n_rows
        evaluations = {}
        with report.screen.doing("evaluating", total) as advance:
            for folder, rows in self._rows.items():
                sums = []
                for batch_sums in sums_of_batches(model, rows, self._mesh, n_rows, n_batches):
                    sums.append(batch_sums)
                    advance()
                    self._phases.progress()
                    if stop is not None and stop():
                        return None
                evaluations[folder] = evaluation_of(rows, sums)
        return evaluations
