"""vLLM's scheduler and model runner with our parts, step by step, in this process.

What is left out of an engine: its core, its processes and its front end.
"""

import copy
import pickle

import torch
from vllm.platforms import current_platform

current_platform.register_triton_kernel_overrides()  # before a runner is imported
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402
from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # noqa: E402

from vllm_accel.host.door import open_door  # noqa: E402
from vllm_accel.host.v1.lazyllm import attention  # noqa: E402
from vllm_accel.host.v1.lazyllm.runner import dress  # noqa: E402
from vllm_accel.host.v1.lazyllm.scheduler import LazyScheduler  # noqa: E402

PAGE = 32


class Steps:
    """One engine's two halves.

    Args:
        folder: of a tiny model.
        settings: of lazyllm.
        engine: more arguments of EngineArgs.
    """

    def __init__(self, folder, settings, *, num_blocks=512, **engine):
        open_door()
        given = {"max_model_len": 640, "enable_prefix_caching": True, **engine}
        self.config = EngineArgs(
            folder,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            block_size=PAGE,
            additional_config={"lazyllm": settings},
            **given,
        ).create_engine_config()
        attention.register()
        self.config.cache_config.num_gpu_blocks_override = num_blocks
        with set_current_vllm_config(self.config):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
                initialize_model_parallel(1, 1)
            self.runner = CPUModelRunner(self.config, torch.device("cpu"))
            dress(self.runner)
            self.runner.load_model()
            self._make_cache()
        self.said, self.asked = {}, 0

    def _make_cache(self):
        specs = pickle.loads(pickle.dumps(self.runner.get_kv_cache_spec()))
        (layout,) = attention.SpanAttentionBackend.supported_kv_cache_layouts()
        self.config.cache_config.kv_cache_layout = layout.name
        (config,) = kv_cache_utils.get_kv_cache_configs(self.config, [specs], [2**26])
        self.config.cache_config.num_gpu_blocks = config.num_blocks
        self.runner.initialize_kv_cache(copy.deepcopy(config))
        kv_cache_utils.init_none_hash(hash)
        self.hasher = kv_cache_utils.get_request_block_hasher(
            PAGE, lambda x: pickle.dumps(x)[-32:]
        )
        self.scheduler = LazyScheduler(
            vllm_config=self.config,
            kv_cache_config=kv_cache_utils.generate_scheduler_kv_cache_config([config]),
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=PAGE,
            hash_block_size=PAGE,
            log_stats=False,
        )
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.all_free = self.pool.get_num_free_blocks()

    def add(self, ids, max_tokens=16, **sampling):
        """Takes a request; gives its id."""
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **sampling
        )
        req_id = f"r{self.asked}"
        self.asked += 1
        self.said[req_id] = []
        request = Request(req_id, ids, params, None, block_hasher=self.hasher)
        self.scheduler.add_request(request)
        return req_id

    def abort(self, req_id):
        self.scheduler.finish_requests(req_id, RequestStatus.FINISHED_ABORTED)

    def step(self):
        scheduled = self.scheduler.schedule()
        sent = pickle.loads(pickle.dumps(scheduled))
        output = self.runner.execute_model(sent)
        if output is None:
            output = self.runner.sample_tokens(None)
        output = pickle.loads(pickle.dumps(output))
        for given in self.scheduler.update_from_output(scheduled, output).values():
            for part in given.outputs:
                self.said[part.request_id] += part.new_token_ids

    def run(self):
        """Steps until everybody is answered, and one more that tells the worker."""
        while self.scheduler.has_unfinished_requests():
            self.step()
        self.step()

    def ask(self, *prompts, **sampling):
        """Tokens of some requests at once."""
        req_ids = [self.add(ids, **sampling) for ids in prompts]
        self.run()
        return [self.said[req_id] for req_id in req_ids]
