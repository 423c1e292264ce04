"""What a worker of a fleet runs, by path: ``worker.py DESCRIPTOR RANK SIZE GENERATION PARENT FOLDER``."""

if __name__ == "__main__":
    from worker_entry import enter

    enter()

    from ltx2_engine.ltx2_core.fleet.handler import EngineJobs
    from ltx2_engine.ltx2_core.parallel.worker_process import serve

    serve(EngineJobs)
