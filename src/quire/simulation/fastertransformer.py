"""FasterTransformerSimulation: request-level batching.

A batch runs until its longest output ends, and all its answers leave together.
"""

from quire.simulation.baselines import BaselineSimulation, Progress, WaitingClient


class FasterTransformerSimulation(BaselineSimulation):
    """Batches as many requests as fit at the longest length.

    A request that ended, failed or was cancelled keeps its slots until the batch ends, as internal waste, and its
    place in the batch is still computed.
    """

    def run(self, on_progress: Progress | None = None) -> None:
        """Run until every counted request has ended."""
        most = self._num_slots // (self._max_model_len * self._num_samples)
        while not self._is_over:
            batch: list[WaitingClient] = []
            start = self.now
            while len(batch) < most and (client := self._first_waiting()) is not None:
                self._enter(client, self._max_model_len)
                batch.append(client)
            if batch:
                self._run_batch(batch, start)
            elif not self._is_over:
                self._skip_to_arrival()
            if on_progress:
                on_progress(self._num_ended)

    def _can_run(self, client: WaitingClient) -> bool:
        fits = self._num_slots >= self._max_model_len * self._num_samples
        return fits and super()._can_run(client)

    def _run_batch(self, batch: list[WaitingClient], start: float) -> None:
        samples, faults = self._num_samples, self._faults
        size, longest = len(batch), max(client.prompt_tokens for client in batch)
        iteration, first_token = 0, -1.0
        unfinished = sorted(batch, key=lambda client: client.output_tokens, reverse=True)
        while unfinished:
            if faults.kills_engine():
                self._waiting.extendleft(reversed(batch))
                self._restart()
                return
            if iteration == 0:
                padded = samples * size * longest
                self._iterate(samples * size, padded, padded * (longest + 1) / 2)
                first_token = self.now
            else:
                self._iterate(0, 0, 0.0, samples * (size - len(unfinished)))
            iteration += 1
            place = faults.fails_step()
            failed = None if place is None else unfinished[int(place * len(unfinished))]
            for client in list(unfinished):
                left = client.leaves is not None and client.leaves <= self.now
                if client is failed or left:
                    self.measures.failed += client.arrival.counted and not left
                    self.measures.cancelled += client.arrival.counted and left
                    self._num_counted -= client.arrival.counted
                    batch.remove(client)
                elif client.output_tokens > iteration:
                    continue
                unfinished.remove(client)
                self._leave(client, iteration)
        self._allocated -= samples * size * self._max_model_len
        for client in batch:
            self._num_counted -= client.arrival.counted
            if client.leaves is not None and client.leaves <= self.now:
                self.measures.cancelled += client.arrival.counted
            elif client.arrival.counted:
                since = start if self._saturate else client.arrival.time
                self.measures.request_finished(since, first_token, self.now, client.output_tokens)
