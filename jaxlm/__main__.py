"""The command line: `jaxlm VERB ...`.

Only this file and `verbs/machine.py` change the state of the whole process: signal handlers, exit code, XLA flags, the
compilation cache.
"""

from __future__ import annotations

import os
import sys

from jaxlm.devices.process import delay_interrupts

with delay_interrupts():
    from jaxlm.devices import hosts, process
    from jaxlm.errors import RunError, Stopped, UserError, suggestion
    from jaxlm.verbs.arguments import Verb, included_configs, summary, usage
    from jaxlm.verbs.audit import audit
    from jaxlm.verbs.baseline import baseline
    from jaxlm.verbs.compress import compress
    from jaxlm.verbs.convert import convert
    from jaxlm.verbs.evaluate import evaluate
    from jaxlm.verbs.explain import explain
    from jaxlm.verbs.generate import generate
    from jaxlm.verbs.inspect import inspect
    from jaxlm.verbs.plan import plan
    from jaxlm.verbs.predict import predict
    from jaxlm.verbs.train import train

_VERBS = (
    train,
    predict,
    evaluate,
    generate,
    compress,
    convert,
    inspect,
    plan,
    baseline,
    explain,
    audit,
)  # in the order of the help
VERBS: dict[str, Verb] = {verb.__name__: verb for verb in _VERBS}


def main(argv: list[str] | None = None) -> int:
    """Runs a verb.

    Args:
      argv: the arguments, verb first; None: those of the process.

    Returns:
      The exit code: 0 for success, 2 for a user's mistake, 1 for a fault of the run, 143 for a training run that was
      stopped, 128 plus the signal for another verb that was stopped, 141 where the output was closed by its reader.

    Raises:
      SystemExit: after `--help`, and for flags that do not exist.
    """
    is_process, argv = argv is None, sys.argv[1:] if argv is None else argv
    process.open_streams()
    with process.catch_signals() as signals:
        try:
            code, error = _run_verb(argv, signals)
        except KeyboardInterrupt:  # after the verb has ended
            code, error = _report_interrupt(argv, signals)
        except SystemExit as end:  # raised by tyro
            raise SystemExit(process.flush_output(end.code if isinstance(end.code, int) else 2)) from None
        if signals.received and not code:  # a callback of JAX swallowed the exception
            code, error = _report_interrupt(argv, signals)
        code = hosts.exit_process(process.flush_output(code), error)
        if signals.received and is_process:
            os._exit(code)  # the interpreter may crash at its exit while a thread of JAX still compiles
        return code


def _run_verb(argv: list[str], signals: process.Signals) -> tuple[int, BaseException | None]:
    """Runs a verb and prints its error; returns the exit code and the error."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview(), flush=True)
            return (0 if argv else UserError.exit_code), None
        if argv[0] not in VERBS:
            raise UserError(f"{argv[0]!r} is not a verb of jaxlm{suggestion(argv[0], VERBS)}")
        return VERBS[argv[0]](argv[1:], signals), None
    except (UserError, RunError, Stopped) as error:
        process.print_error(f"{'' if isinstance(error, Stopped) else 'error: '}{error}")
        return error.exit_code, error
    except KeyboardInterrupt:
        return _report_interrupt(argv, signals)
    except BrokenPipeError as error:  # the reader of the output, such as `head`, has closed it
        return process.report_lost_output(error), error
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        process.print_error(
            f"error: {reason}; free disk space or fix the permissions, or choose another --workdir or --data.cache, "
            f"then run the command again"
        )
        return RunError.exit_code, error
    except Exception as error:
        if signals.received:  # XLA wraps an interrupt in its own error
            return _report_interrupt(argv, signals)
        if "RESOURCE_EXHAUSTED" not in str(error):
            hosts.exit_with_traceback(error)
            raise
        reason = str(error).splitlines()[0][:300].rstrip(".")
        process.print_error(
            f"error: out of memory: {reason}; use --remat full, a larger --accumulate, or a smaller --batch or "
            f"--data.length; jaxlm plan CONFIG shows what uses the memory"
        )
        return RunError.exit_code, error


def _report_interrupt(argv: list[str], signals: process.Signals) -> tuple[int, BaseException]:
    """Prints that a signal ended a verb without a result; returns the exit code and the exception."""
    if argv[:1] == ["train"]:
        end = Stopped("stopped before there was anything to save; run the same command to start again")
        process.print_error(str(end))
        return end.exit_code, end
    process.print_error(f"stopped by {signals.name}; no complete output was written")
    return signals.code, KeyboardInterrupt()


def _overview() -> str:
    """Returns the text of `jaxlm --help`."""
    verbs = "\n".join(f"  {verb:10} {summary(function)}\n{'':12} {usage(function)}" for verb, function in VERBS.items())
    return (
        f"usage: jaxlm VERB ...\n\n{verbs}\n\n"
        f"MODEL is the folder of a run, a folder in Hugging Face format, or a hub name.\n"
        f"CONFIG is a Python file, or the name of an included config:\n{included_configs()}\n\n"
        f"jaxlm VERB --help lists the flags of a verb; jaxlm train CONFIG --help lists those of a training run."
    )


if __name__ == "__main__":
    sys.exit(main())
