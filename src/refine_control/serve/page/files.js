// Fetching, with errors that a reader understands. Nothing here asks another host than the page's own.

/** Something that whoever looks at the page can understand and mend. */
export class Fault extends Error {}

async function get(path) {
  const answer = await fetch(path).catch(() => {
    throw new Fault(`“${path}” cannot be fetched. Is the server still running, and this device connected to it?`);
  });
  if (!answer.ok) throw new Fault(`“${path}” cannot be fetched: the server answers ${answer.status}.`);
  return answer;
}

export async function getJson(path) {
  const answer = await get(path);
  return answer.json().catch(() => {
    throw new Fault(`“${path}” is no JSON. Export the model again.`);
  });
}

/**
 * A whole file as a Blob, which the browser may keep on disk.
 *
 * @param size in bytes, where known: a file cut off on its way is refused
 * @param onBytes told how many bytes each piece has
 */
export async function getBlob(path, size = null, onBytes = () => {}) {
  const answer = await get(path);
  const pieces = [];
  let received = 0;
  try {
    for (const reader = answer.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      pieces.push(value);
      received += value.length;
      onBytes(value.length);
    }
  } catch {
    throw new Fault(`“${path}” broke off after ${received} bytes. Reload the page to try again.`);
  }
  if (size !== null && received !== size) {
    throw new Fault(`“${path}” has ${received} bytes, not ${size}: it was cut off. Copy or export the folder again.`);
  }
  return new Blob(pieces);
}
