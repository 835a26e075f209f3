// The pictures of the README, from a running `make up`, by a real headless browser.
//
//   npm install playwright-core && node docs/screenshots.mjs OUT_DIR [PREFECT_URL [MLFLOW_URL]]
//
// Fills in the form of `smoke` and submits it, follows the run to its end, compares the two newest trainings in MLflow.
import { chromium } from 'playwright-core';

const [out, prefect = 'http://127.0.0.1:4200', mlflow = 'http://127.0.0.1:5000'] = process.argv.slice(2);
const source = process.env.SOURCE || '';
const call = async (url, body) => {
  const options = body ? { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) } : {};
  return (await fetch(url, options)).json();
};
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-sync'],
});
const open = async (url, width, height, pause) => {
  const page = await browser.newPage({ viewport: { width, height } });
  await page.goto(url, { waitUntil: 'load' });
  await page.waitForTimeout(pause);
  return page;
};
const keep = async (page, name) => {
  await page.screenshot({ path: `${out}/${name}.png` });
  console.log(name, page.url());
};

const list = await open(`${prefect}/deployments`, 1440, 1000, 8000);
await keep(list, 'prefect-deployments');

const smoke = await call(`${prefect}/api/deployments/name/pipeline/smoke`);
const form = await open(`${prefect}/deployments/deployment/${smoke.id}/run`, 1440, 1500, 8000);
// Prefect's labels are not tied to their inputs: the input is what follows.
const field = (label, tag) => form.locator(`xpath=//label[contains(., "${label}")]/following::${tag}[1]`);
if (source) await field('Source of text', 'textarea').fill(source);
await field('Max Steps', 'input').fill('120');
await form.waitForTimeout(500);
await keep(form, 'prefect-form');
await form.getByRole('button', { name: /^(Submit|Run)$/ }).first().click();
await form.waitForTimeout(4000);

let run;
for (let i = 0; i < 120; i++) {
  [run] = await call(`${prefect}/api/flow_runs/filter`, { sort: 'EXPECTED_START_TIME_DESC', limit: 1, flow_runs: { deployment_id: { any_: [smoke.id] } } });
  if (run && ['COMPLETED', 'FAILED', 'CRASHED'].includes(run.state_type)) break;
  await new Promise((resolve) => setTimeout(resolve, 3000));
}
console.log(run.name, run.state_type, JSON.stringify(run.parameters));
await keep(await open(`${prefect}/runs/flow-run/${run.id}`, 1440, 1000, 8000), 'prefect-flow-run');
const artifacts = await open(`${prefect}/runs/flow-run/${run.id}`, 1440, 1400, 8000);
await artifacts.getByText('Artifacts', { exact: true }).last().click();
await artifacts.waitForTimeout(4000);
await keep(artifacts, 'prefect-artifacts');

const found = await call(`${mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name=smoke`);
const id = found.experiment.experiment_id;
const runs = (await call(`${mlflow}/api/2.0/mlflow/runs/search`, { experiment_ids: [id], max_results: 100 })).runs;
const pick = runs.filter((r) => /(^|\/)(train|rnn)$/.test(r.info.run_name)).slice(0, 2).map((r) => r.info.run_id);
const text = encodeURIComponent;
const look = async (name, path, height, act = async () => {}) => {
  const page = await open(`${mlflow}/#/${path}`, 1500, height, 9000);
  await page.mouse.click(1473, 36); // the assistant's panel, which a fresh browser opens
  await page.waitForTimeout(3000);
  await act(page);
  await keep(page, name);
};
await look('mlflow-compare', `compare-runs?runs=${text(JSON.stringify(pick))}&experiments=${text(JSON.stringify([id]))}`, 1150);
await look('mlflow-charts', `experiments/${id}/runs?compareRunsMode=CHART`, 1000, async (page) => {
  await page.mouse.click(351, 234); // the newest run's steps
  await page.getByPlaceholder('Search metric charts').fill('^train/(loss|bpb|lr|grad_norm)');
  await page.waitForTimeout(5000);
});
await browser.close();
