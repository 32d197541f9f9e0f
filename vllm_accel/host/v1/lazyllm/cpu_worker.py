"""Workers on CPU: vLLM's or ours, with our attention and our runner."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_accel.host.v1.cpu_worker import AccelCPUWorker
from vllm_accel.host.v1.lazyllm import attention
from vllm_accel.host.v1.lazyllm.runner import dress
from vllm_accel.host.v1.seeds import keep_seeds


class LazyCPUWorker(CPUWorker):
    """Registers the attention before a model is made, dresses the runner after."""

    def init_device(self) -> None:
        """See `vllm.v1.worker.worker_base.WorkerBase.init_device`."""
        attention.register()
        super().init_device()
        dress(self.model_runner)
        keep_seeds(self.model_runner)

    def pages_run(self) -> dict[str, list[float]] | None:
        """By span of layers, the share of each page of the latest prompt pruned that ran.

        None if no prompt was pruned.
        """
        pages: dict[str, list[float]] | None = self.model_runner.pages_run()
        return pages


class LazyAccelCPUWorker(AccelCPUWorker, LazyCPUWorker):
    """Prunes, and drafts: the runner is dressed for both."""
