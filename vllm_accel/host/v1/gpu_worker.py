"""Worker on GPU: vLLM's own, with our runner."""

from vllm.v1.worker.gpu_worker import Worker

from vllm_accel.host.v1.dress import dress


class AccelGPUWorker(Worker):
    """Dresses the model runner once the device has made it."""

    def init_device(self) -> None:
        """See `vllm.v1.worker.worker_base.WorkerBase.init_device`."""
        super().init_device()
        dress(self.model_runner)
