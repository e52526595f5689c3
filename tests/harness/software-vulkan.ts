// A Vulkan device in software for tests of the WebGPU provider: Mesa's lavapipe, from release 25, the first with the
// features that Dawn needs. Owns fetching it: Debian's packages, from the mirror that the machine's apt uses, unpacked
// into the cache; nothing is installed, and root is not needed.

import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { ClusterError } from '@mimo/core/process/errors';

const run = promisify(execFile);
const packages = ['mesa-vulkan-drivers', 'libvulkan1'];

/** Variables that a process must be started with in order to find the device. */
export interface VulkanEnvironment {
  readonly VK_DRIVER_FILES: string;
  readonly LD_LIBRARY_PATH?: string;
}

/**
 * The device that VK_DRIVER_FILES names, else lavapipe out of the cache, fetched at the first call. Throws
 * `failed_precondition` with what to do if it cannot be had.
 */
export async function findSoftwareVulkan(
  cacheDirectory: string,
  env: NodeJS.ProcessEnv = process.env,
): Promise<VulkanEnvironment> {
  if (env['VK_DRIVER_FILES'] !== undefined) {
    return { VK_DRIVER_FILES: env['VK_DRIVER_FILES'] };
  }
  const directory = join(cacheDirectory, 'software-vulkan');
  const driver = join(directory, 'lavapipe.json');
  if (!existsSync(driver)) {
    await mkdir(cacheDirectory, { recursive: true });
    const temporary = await mkdtemp(`${directory}-`);
    try {
      await fetchLavapipe(temporary);
      await rename(temporary, directory).catch(async (error: unknown) => {
        // Another process was first.
        if (!existsSync(driver)) {
          throw error;
        }
      });
    } catch (error) {
      throw new ClusterError(
        'failed_precondition',
        `software Vulkan: set VK_DRIVER_FILES to the driver json of Mesa's lavapipe 25 or later, or run on Debian 12 with apt: ${ClusterError.from(error).message}`,
        { cause: error },
      );
    } finally {
      await rm(temporary, { recursive: true, force: true });
    }
  }
  const libraries = await libraryDirectory(directory);
  // Driver files name their library by path or for the loader to find; by name it would find an older one.
  await writeFile(
    driver,
    JSON.stringify({
      file_format_version: '1.0.0',
      ICD: { library_path: join(libraries, 'libvulkan_lvp.so'), api_version: '1.4.305' },
    }),
  );
  return { VK_DRIVER_FILES: driver, LD_LIBRARY_PATH: libraries };
}

async function fetchLavapipe(directory: string): Promise<void> {
  const codename = /^VERSION_CODENAME=(.*)$/m.exec(await readFile('/etc/os-release', 'utf8'))?.[1];
  const { stdout: targets } = await run('apt-get', [
    'indextargets',
    '--format',
    '$(REPO_URI) $(RELEASE) $(COMPONENT)',
    'Identifier: Packages',
  ]);
  const mirror = targets
    .split('\n')
    .map((line) => line.split(' '))
    .find(([, release, component]) => release === codename && component === 'main')?.[0];
  if (codename === undefined || mirror === undefined) {
    throw new ClusterError('not_found', `apt has no source for the suite ${codename}`);
  }
  const state = join(directory, 'apt');
  await mkdir(join(state, 'lists', 'partial'), { recursive: true });
  await mkdir(join(state, 'cache', 'archives', 'partial'), { recursive: true });
  const backports = `${codename}-backports`;
  await writeFile(
    join(state, 'sources.list'),
    [codename, backports].map((suite) => `deb ${mirror} ${suite} main\n`).join(''),
  );
  const options = [
    `Dir::Etc::SourceList=${join(state, 'sources.list')}`,
    'Dir::Etc::SourceParts=/dev/null',
    `Dir::State::Lists=${join(state, 'lists')}`,
    `Dir::Cache=${join(state, 'cache')}`,
  ].flatMap((option) => ['-o', option]);
  const apt = (...args: string[]): Promise<{ stdout: string }> =>
    run('apt-get', [...options, '-q', '-t', backports, ...args], { cwd: state, maxBuffer: 2 ** 24 });
  await apt('update');
  const { stdout: plan } = await apt('-s', '--no-install-recommends', 'install', ...packages);
  // What the machine lacks or has in an older version; with nothing to do, everything is there already.
  const names = [...plan.matchAll(/^Inst (\S+)/gm)].map((match) => match[1]!);
  await apt('download', ...new Set([...packages, ...names]));
  for (const file of (await readdir(state)).filter((name) => name.endsWith('.deb'))) {
    await run('dpkg-deb', ['-x', join(state, file), directory]);
  }
  await rm(state, { recursive: true });
  await writeFile(join(directory, 'lavapipe.json'), '');
}

async function libraryDirectory(root: string): Promise<string> {
  const base = join(root, 'usr', 'lib');
  const triplets = await readdir(base);
  const found = triplets.find((name) => existsSync(join(base, name, 'libvulkan_lvp.so')));
  if (found === undefined) {
    throw new ClusterError('not_found', `${base}: no libvulkan_lvp.so`);
  }
  return join(base, found);
}
