// Node.js at work: maps, buffers, timers, hashing in the thread pool, a worker thread, and much garbage.
// node_work.js OUT
'use strict';
const crypto = require('crypto');
const fs = require('fs');
const { Worker, isMainThread, parentPort } = require('worker_threads');

if (!isMainThread) {
  let n = 0;
  parentPort.on('message', (x) => parentPort.postMessage({ n: n++, square: x * x }));
  return;
}

const out = fs.openSync(process.argv[2], 'a');
const errors = [];
const check = (condition, text) => {
  if (!condition && errors.length < 16) errors.push(text);
};
const map = new Map();
let sum = 0n, next = 0, hashes = 0, answers = 0, ticks = 0, last = process.hrtime.bigint();
const buffer = crypto.randomBytes(8 << 20);
const digest = (i) => crypto.createHash('sha1').update(buffer.subarray(i * 4096, (i + 1) * 4096)).digest('hex');
const digests = Array.from({ length: buffer.length / 4096 }, (_, i) => digest(i));
const worker = new Worker(__filename);
const password = crypto.pbkdf2Sync('x', 'salt', 2000, 32, 'sha256').toString('hex');

worker.on('message', ({ n, square }) => {
  check(n === answers && square === answers * answers, `worker: answer ${n} to ${answers}`);
  worker.postMessage(++answers);
});
worker.on('error', (e) => check(false, `worker: ${e}`));
worker.postMessage(0);

function hash() {
  crypto.pbkdf2('x', 'salt', 2000, 32, 'sha256', (error, key) => {
    check(!error && key.toString('hex') === password, 'a hash from the thread pool is wrong');
    hashes++;
    setTimeout(hash, 5);
  });
}
hash();
hash();

// A hot function over objects, so that it is compiled, and garbage of all ages.
function work() {
  for (let i = 0; i < 2000; i++) {
    map.set(`key-${next}`, { n: next, text: String(next).repeat(3), list: [next, next + 1] });
    sum += BigInt(next++);
    if (map.size > 50000) {
      const [key, value] = map.entries().next().value;
      sum -= BigInt(value.n);
      map.delete(key);
    }
  }
  for (let i = 0; i < 20; i++) {
    const page = crypto.randomInt(digests.length);
    buffer.writeUInt32LE(crypto.randomInt(1 << 30), page * 4096 + crypto.randomInt(4092));
    digests[page] = digest(page);
  }
}
setInterval(() => {
  const now = process.hrtime.bigint();
  check(now >= last, 'the monotonic clock went back');
  last = now;
  ticks++;
  work();
}, 5);

let n = 0, before = { hashes: -1, answers: -1, ticks: -1 };
setInterval(() => {
  let total = 0n;
  for (const [key, value] of map) {
    total += BigInt(value.n);
    if (key !== `key-${value.n}` || value.text !== String(value.n).repeat(3) || value.list[1] !== value.n + 1)
      check(false, `map: ${key} is wrong`);
  }
  check(total === sum, 'map: the sum is wrong');
  for (let i = 0; i < digests.length; i++) check(digest(i) === digests[i], `buffer: page ${i} is wrong`);
  before = { hashes, answers, ticks };
  fs.writeSync(out, JSON.stringify({ n: n++, ok: errors.length === 0, errors, pid: process.pid, work: ticks, hashes, answers }) + '\n');
}, 200);
