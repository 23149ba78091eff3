"""Runs pretrain.main in processes forked after one import of torch: a run costs only itself. Not a test.

Reads jobs, JSON lines, from stdin and answers each with a JSON line, {"codes": exit codes by rank, "stderr"}:
{"config": fields of pretrain.Config, "size": processes, "signal": what all of them are sent, "after" so many
seconds from the moment when so many "rows" are in the log, "half_save": the number of the save in whose
middle a process dies, "file_limit": bytes that a file can have}
"""
import io
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

import pretrain
from plumbing import cli


def die_in_the_middle_of_save(number):
    save, calls = torch.save, []

    def half(state, file):
        calls.append(1)
        if len(calls) < number:
            return save(state, file)
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half


def child(job, rank, port, errors):
    signal.alarm(120)   # a deadlock must not last for as long as gloo is patient
    os.setsid()   # so that a signal to its group reaches its loaders and nobody else
    os.dup2(errors.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    torch.set_num_threads(1)
    if job.get("size", 1) > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["size"]),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if "half_save" in job:
        die_in_the_middle_of_save(job["half_save"])
    if "file_limit" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    try:
        pretrain.main(pretrain.Config(**job["config"]))
        code = 0
    except SystemExit as e:
        code = e.code
    except cli.UserError as e:
        print(e, file=sys.stderr, flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def wait_for_rows(path, rows):
    deadline = time.monotonic() + 60
    while rows and time.monotonic() < deadline:
        if os.path.exists(path):
            with open(path) as f:
                if f.read().count("\n") >= rows:
                    return
        time.sleep(0.005)


def run(job):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    with open(os.path.join(job["config"]["out"] + ".stderr"), "w+") as errors:
        for rank in range(job.get("size", 1)):
            pid = os.fork()
            if pid == 0:
                child(job, rank, port, errors)
            pids.append(pid)
        if "signal" in job:
            wait_for_rows(os.path.join(job["config"]["out"], "log.jsonl"), job.get("rows", 0))
            time.sleep(job.get("after", 0))
            for pid in pids:
                try:
                    os.killpg(pid, job["signal"])
                except ProcessLookupError:   # it has ended, or has not made its group yet
                    os.kill(pid, job["signal"])
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        errors.seek(0)
        return {"codes": codes, "stderr": errors.read()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
