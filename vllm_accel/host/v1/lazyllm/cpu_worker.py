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

    def surviving_pages(self) -> dict[str, list[int]] | None:
        """By span of layers, pages of the latest pruned prompt that ran it, if any was."""
        pages: dict[str, list[int]] | None = self.model_runner.surviving_pages()
        return pages


class LazyAccelCPUWorker(AccelCPUWorker, LazyCPUWorker):
    """Prunes, and drafts: the runner is dressed for both."""
