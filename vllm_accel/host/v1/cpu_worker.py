"""Worker on CPU: vLLM's own, with our runner."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_accel.host.hooks import cpu_expand
from vllm_accel.host.v1.dress import dress
from vllm_accel.host.v1.seeds import keep_seeds


class AccelCPUWorker(CPUWorker):
    """Dresses the model runner once the device has made it."""

    def init_device(self) -> None:
        """See `vllm.v1.worker.worker_base.WorkerBase.init_device`."""
        super().init_device()
        cpu_expand.apply()
        dress(self.model_runner)
        keep_seeds(self.model_runner)
